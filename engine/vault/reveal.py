"""Reveal sealed files: the source file where it was kept, otherwise the image.

With a subject this answers an access request: everything of one person and nothing else, with a
list of contents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path, PurePosixPath

from data.images import is_image_name
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import subject_rows
from engine.vault.opening import (
    OpenOptions,
    OutputFolder,
    checked_list,
    files_in,
    output_name,
    unseal,
    write_opened,
)
from engine.vault.reading import (
    check_listed,
    check_original,
    digest_of,
    key_id_of,
)
from engine.vault.sealed_folder import SEALED_SUFFIX
from engine.vault.subjects import any_label
from modeling.encryption.ised_errors import BadInput, IsedError, Tampered, UnsafePath, UsageError
from modeling.encryption.primitives import KeyOf
from modeling.encryption.sealed_image import Metadata
from modeling.encryption.sealed_original import ORIGINAL_SUFFIX
from utils.files import PRIVATE_MODE, atomic_write, check_regular, ensure_folder, remove_leftovers
from utils.logger import Progress

CONTENTS_NAME = "contents.json"
_SUFFIXES = (SEALED_SUFFIX, ORIGINAL_SUFFIX)
_MAX_LINE_BYTES = 1 << 14  # longer than the first line with any label


@dataclass(frozen=True)
class Revealed:
    """The result for one sealed file."""

    sealed: Path  # the sealed image or sealed source file
    content: str = ""  # `original`, `recovered` or `anonymized`; '' after an error
    output: str = ""  # relative path of the file that was written
    metadata: Metadata | None = None  # metadata of the source
    error: IsedError | None = None  # why it could not be opened or written

    def to_json(self) -> str:
        """Return the entry in the list of contents."""
        entry: dict[str, object] = {"sealed": self.sealed.name}
        if self.metadata is None:
            entry["error"] = f"{type(self.error).__name__}: {self.error}"
        else:
            entry |= {
                "file": self.output,
                "content": self.content,
                "source": self.metadata.path,
                "source_width": self.metadata.orig_w,
                "source_height": self.metadata.orig_h,
                "source_sha256": self.metadata.source_sha256.hex(),
            }
        return json.dumps(entry)


def reveal(
    sealed: Path,
    folder: OutputFolder,
    keyring: Keyring,
    options: OpenOptions,
    subject: str | None = None,
    *,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[Revealed]:
    """Write source files bit for bit; where none was kept or opens, write the image instead.

    ``sealed`` is a folder of sealed files, or one of them. With a subject label, only the files of
    this subject are revealed. The output folder also gets a list of contents.

    Files are compared with the manifest of the folder, also those of other subjects: a file of the
    subject may have got the header of another one. ``note`` is called with a line if the folder has
    no manifest.

    Yields:
        The result for each sealed file that was opened, could not be opened, or is missing.

    Raises:
        MissingKey: The keyring has never had a key of the subject.
        UsageError: The output folder contains the files of another subject.
        StorageError: The disk is full, read-only or failing.
    """
    stems = _sealed_stems(sealed)
    own = None
    if subject is not None:
        own = frozenset(row.key_id for row in subject_rows(keyring, subject))
    with _contents(folder.root, subject) as add:
        listed, problems = checked_list(sealed, keyring, _SUFFIXES, note)
        missing = (Revealed(file.path, error=file.error) for file in problems)
        for revealed in chain(missing, _revealed(stems, folder, keyring, options, own, listed)):
            add(revealed)
            yield revealed


def _sealed_stems(path: Path) -> list[Path]:
    """Return the sealed files of a folder without their suffixes, sorted, or the one file."""
    if path.is_file() and path.suffix in (SEALED_SUFFIX, ORIGINAL_SUFFIX):
        return [path.with_suffix("")]
    if not path.exists():
        raise BadInput(f"{path} does not exist; expected a sealed file or a folder of them")
    files = files_in(path, SEALED_SUFFIX) + files_in(path, ORIGINAL_SUFFIX)
    if not files:
        raise BadInput(f"{path} contains no sealed files (*{SEALED_SUFFIX}, *{ORIGINAL_SUFFIX})")
    return sorted({file.with_suffix("") for file in files}, key=attrgetter("name"))


def _revealed(
    stems: list[Path],
    folder: OutputFolder,
    keyring: Keyring,
    options: OpenOptions,
    own: frozenset[bytes] | None,
    listed: Mapping[str, str],
) -> Iterator[Revealed]:
    """Write the files whose keys are ``own``, or all files; see `reveal`."""

    def own_key(header: bytes) -> bytes:
        """Return a key: a file may be exchanged for another person's after `key_id_of` read it."""
        row = keyring.row_of(header)
        if row is not None and own is not None and row.key_id not in own:
            raise Tampered("was exchanged for the file of another subject during this command")
        return keyring.opening_key(header)

    images: list[Path] = []
    for stem in Progress.over(stems, "Reveal"):
        original, image = (stem.with_name(stem.name + s) for s in (ORIGINAL_SUFFIX, SEALED_SUFFIX))
        is_written = False
        for path in (original, image):
            if is_written or not os.path.lexists(path):
                continue
            try:
                if own is not None and key_id_of(path, keyring) not in own:
                    if path.name in listed:
                        check_listed(path, digest_of(path), listed)
                    continue
                if path is image:
                    images.append(path)
                    continue
                yield _write_original(path, folder, keyring, own_key, listed)
                is_written = True
            except IsedError as error:
                yield Revealed(path, error=error.of_one_file())
    content = "anonymized" if options.model is None else "recovered"
    opened = unseal(Progress.over(images, "Open"), own_key, listed)
    for file in write_opened(opened, folder, options):
        if file.image is None or file.error is not None:
            yield Revealed(file.path, error=file.error)
        else:
            metadata = file.image.metadata
            yield Revealed(file.path, content, output_name(metadata, file.path), metadata)


def _write_original(
    path: Path, folder: OutputFolder, keyring: Keyring, key_of: KeyOf, listed: Mapping[str, str]
) -> Revealed:
    original, digest = check_original(path, keyring, key_of)
    check_listed(path, digest, listed)
    name = original.metadata.path
    if not is_image_name(PurePosixPath(name).name):  # another program sealed the file
        raise UnsafePath(f"path {name!a} is not that of an image")
    folder.write(name, original.content)
    return Revealed(path, "original", name, original.metadata)


@contextmanager
def _contents(folder: Path, subject: str | None) -> Iterator[Callable[[Revealed], None]]:
    """Yield a function that adds a line to the list of contents in a folder, a JSON object.

    The first line names the subject, so that the files of two people never share a folder. It marks
    the list as unfinished until the block has succeeded.
    """
    head = {"subject": None if subject is None else any_label(subject)}
    unfinished, finished = (
        json.dumps({**head, "finished": done})[:-1] + ', "files": [\n' for done in (False, True)
    )
    path = folder / CONTENTS_NAME
    if not folder.exists():
        ensure_folder(folder).chmod(0o700)  # subfolders may have the names of people
    remove_leftovers(ensure_folder(folder))  # of a killed run
    if os.path.lexists(path):
        try:
            check_regular(path)
            with path.open("rb") as old:
                line = old.readline(_MAX_LINE_BYTES)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror})") from None
        if line not in (unfinished.encode(), finished.encode()):
            raise UsageError(
                f"{path} is the list of another subject, or not a list of this command; choose an "
                "empty output folder"
            )
    with atomic_write(path, mode=PRIVATE_MODE) as temporary:
        temporary.write_text(unfinished + "]}\n", encoding="utf-8")
    with (
        atomic_write(path, mode=PRIVATE_MODE) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        separator = ""

        def add(revealed: Revealed) -> None:
            nonlocal separator
            file.write(separator + revealed.to_json())
            separator = ",\n"

        file.write(finished)
        yield add
        file.write("\n]}\n")
