"""A folder of sealed files: writing a file under its final name, and the sealed manifest."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modeling.encryption.ised_errors import (
    AuthenticationError,
    BadInput,
    IsedError,
    OutputBlocked,
    OutputExists,
    StorageError,
    Tampered,
    UsageError,
)
from modeling.encryption.primitives import open_sealed, seal
from utils.files import PRIVATE_MODE, atomic_write, read_at_most

MANIFEST_NAME = "manifest.ised"
SEALED_SUFFIX = ".png"
MAX_MANIFEST_BYTES = 1 << 28  # about 2.5 million files
_CONTEXT = "manifest"
_AAD = b"securereid/ised/manifest/1"
# No other output could be written either. Other errors concern one name only.
_STOPPING = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG))


@dataclass(frozen=True)
class Manifest:
    """The files of a sealed folder at the end of the last protect run, sealed under the keyring.

    Reveals what no single file can: a file that is missing, was added, or was replaced by another
    valid one. It does not reveal that the whole folder was rolled back with its own manifest.
    """

    dataset: str  # data set of the last run
    # SHA-256 in hexadecimal of each file by name
    files: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path, key: bytes) -> None:
        """Write the manifest into a folder, atomically; file and folder get modification time 0.

        Raises:
            StorageError: It cannot be written, or would be longer than MAX_MANIFEST_BYTES.
        """
        text = json.dumps({"dataset": self.dataset, "files": dict(sorted(self.files.items()))})
        stored = seal(key, _CONTEXT, _AAD, text.encode())
        path = folder / MANIFEST_NAME
        if len(stored) > MAX_MANIFEST_BYTES:
            raise StorageError(f"{path}: {len(self.files)} files are too many; use several folders")
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else PRIVATE_MODE
        try:
            with atomic_write(path, mode=mode) as temporary:
                temporary.write_bytes(stored)
                os.utime(temporary, (0, 0))
        except OSError as error:  # also a WriteError of atomic_write
            raise StorageError(f"manifest: {error}; run the same command again") from None
        with suppress(PermissionError):  # only the owner of a folder may set its date
            os.utime(folder, (0, 0))  # copies keep the dates of folders too

    @classmethod
    def load(cls, folder: Path, key: bytes) -> Manifest | None:
        """Return the manifest of a folder, or None if it has none.

        Raises:
            BadInput: It cannot be read.
            WrongKey: It was sealed under another keyring.
            Tampered: It was changed, or is longer than MAX_MANIFEST_BYTES.
        """
        path = folder / MANIFEST_NAME
        try:
            stored = read_at_most(path, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
        if stored is None:
            raise Tampered(f"{path} is longer than any manifest ({MAX_MANIFEST_BYTES} bytes)")
        try:
            content = json.loads(open_sealed(key, _CONTEXT, _AAD, stored))
            return cls(content["dataset"], content["files"])
        except AuthenticationError as error:
            raise type(error)(f"{path}: {error}") from None
        except (KeyError, TypeError, json.JSONDecodeError):
            raise Tampered(f"{path} is not a manifest that this program writes") from None


def listed_files(folder: Path, key: bytes) -> Mapping[str, str]:
    """Return the files that the manifest of a folder lists: SHA-256 (hexadecimal) by name."""
    manifest = Manifest.load(folder, key)
    return {} if manifest is None else manifest.files


def unlist(
    folder: Path, key: bytes, manifest: Manifest, names: Sequence[str], *, overwrite: bool
) -> Manifest:
    """Remove the files that a run will write from a manifest; save and return it.

    If the run is killed, its files differ from those that the old manifest lists; the next run
    would reject them as foreign.
    """
    rewritten = {name for name in names if overwrite or not (folder / name).exists()}
    files = {name: digest for name, digest in manifest.files.items() if name not in rewritten}
    kept = Manifest(manifest.dataset, files)
    if len(kept.files) < len(manifest.files):
        kept.save(folder, key)
    return kept


def publish(path: Path, content: bytes | memoryview, *, overwrite: bool) -> None:
    """Write a file under its final name: complete, synced, with modification time 0.

    The caller syncs the folder, once for many files.

    Raises:
        OutputExists: The name is taken and ``overwrite`` is False.
        OutputBlocked: This name cannot be written; an example is a folder of that name.
        StorageError: The disk is full, read-only or failing; no temporary file is left.
    """
    try:
        with atomic_write(
            path, mode=PRIVATE_MODE, overwrite=overwrite, sync_names=False
        ) as temporary:
            temporary.write_bytes(content)
            os.utime(temporary, (0, 0))  # dates would reveal when each image was sealed
    except FileExistsError:
        raise OutputExists(f"{path} exists already; it was kept, --overwrite replaces it") from None
    except OSError as error:
        raise output_error(path, getattr(error, "cause", error)) from None  # of a WriteError


def output_error(path: Path, error: OSError) -> IsedError:
    """Return StorageError for a full, read-only or failing disk, or else OutputBlocked."""
    if error.errno in _STOPPING:
        return StorageError(
            f"cannot write {path}: {error.strerror}; finished files are complete, the same command "
            "continues when there is room"
        )
    return OutputBlocked(f"cannot write {path}: {error.strerror}; remove what is in its place")


def check_apart(source: Path, target: Path, keyring: Path) -> None:
    """Raise UsageError if one folder contains the other, or the target contains the keyring."""
    source_path, target_path = source.resolve(), target.resolve()
    if source_path.is_relative_to(target_path) or target_path.is_relative_to(source_path):
        raise UsageError(
            f"{source} and {target} are the same folder or one contains the other; use two "
            "separate folders"
        )
    if keyring.resolve().is_relative_to(target_path):
        raise UsageError(
            f"the keyring {keyring} is in the output folder {target}; keep it elsewhere"
        )
