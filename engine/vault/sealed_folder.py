"""A folder of sealed pictures: names taken once and for all, and a sealed list of what is there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from engine.vault.secret_files import PRIVATE_MODE, link_without_clobber
from modeling.encryption.ised_errors import (
    AuthenticationError,
    BadInput,
    OutputExists,
    StorageError,
    Tampered,
    UsageError,
)
from modeling.encryption.primitives import open_sealed, seal
from utils.files import atomic_write, check_regular, temporary_beside

MANIFEST_NAME = "manifest.ised"
SEALED_SUFFIX = ".png"
_CONTEXT = "manifest"
_AAD = b"securereid/ised/manifest/1"
_STOPPING = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EFBIG)
)


@dataclass(frozen=True)
class Manifest:
    """What a sealed folder held when protecting it ended.

    It notices what no single file can: one that is missing, added, or replaced by another valid
    one. Putting back the whole folder with its own manifest goes unseen.

    Attributes:
        dataset: Name that the file names depend on.
        files: SHA-256 in hexadecimal of each file by name.
    """

    dataset: str
    files: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path, key: bytes) -> None:
        """Seal it into the folder, in place of the one there; file and folder get no date."""
        text = json.dumps({"dataset": self.dataset, "files": dict(sorted(self.files.items()))})
        with atomic_write(folder / MANIFEST_NAME) as temporary:
            temporary.touch(PRIVATE_MODE)
            temporary.write_bytes(seal(key, _CONTEXT, _AAD, text.encode()))
            os.utime(temporary, (0, 0))
        with suppress(PermissionError):  # somebody else's folder: its date is theirs
            os.utime(folder, (0, 0))  # copies take the dates along, of folders too

    @classmethod
    def load(cls, folder: Path, key: bytes) -> Manifest | None:
        """Open the manifest of a folder; None if there is none.

        Raises:
            BadInput: It cannot be read.
            WrongKey: It is another keyring's.
            Tampered: It was changed.
        """
        path = folder / MANIFEST_NAME
        try:
            check_regular(path)
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
        try:
            content = json.loads(open_sealed(key, _CONTEXT, _AAD, stored))
            return cls(content["dataset"], content["files"])
        except AuthenticationError as error:
            raise type(error)(f"{path}: {error}") from None
        except (KeyError, TypeError, json.JSONDecodeError):
            raise Tampered(f"{path} is not what this program writes") from None


def publish(path: Path, content: bytes, *, overwrite: bool) -> None:
    """Write a file under its final name: whole, on the disk, and without a date.

    The caller syncs the folder: once for many files.

    Raises:
        OutputExists: The name is taken and ``overwrite`` is off.
        StorageError: The disk is full, read-only or failing; nothing is left behind.
    """
    temporary = temporary_beside(path)
    try:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, PRIVATE_MODE), "wb") as file:
            file.write(content)
            file.flush()
            os.utime(file.fileno(), (0, 0))  # when a picture was sealed is nobody's business
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            link_without_clobber(temporary, path)
    except FileExistsError:
        raise OutputExists(f"{path} exists already; it was kept, --overwrite replaces it") from None
    except OSError as error:
        raise storage_error(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def storage_error(path: Path, error: OSError) -> OSError | StorageError:
    """Return the named error for a failing disk; other errors as they are."""
    if error.errno in _STOPPING:
        return StorageError(
            f"cannot write {path}: {error.strerror}; finished files are whole, the same command "
            "goes on when there is room"
        )
    return error


def check_apart(source: Path, target: Path, keyring: Path | None) -> None:
    """Refuse folders that lie in each other, and a keyring as target.

    Raises:
        UsageError: Nothing was touched.
    """
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UsageError(
            f"{source} and {target} are one folder or lie in each other; keep them apart"
        )
    if keyring is not None and (other == keyring.resolve() or other in keyring.resolve().parents):
        raise UsageError(f"the keyring {keyring} must not lie in the output {target}")
