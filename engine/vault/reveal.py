"""Reveal sealed files: the source file where it was kept, otherwise the image.

With a subject this answers an access request: everything of one person and nothing else, with a
list of contents.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path, PurePosixPath

from data.images import is_image_name
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import subject_rows
from engine.vault.opening import (
    OpenOptions,
    OutputFolder,
    files_in,
    output_name,
    unseal,
    write_opened,
)
from engine.vault.originals import ORIGINAL_SUFFIX, check_original, key_id_of
from engine.vault.sealed_folder import SEALED_SUFFIX
from engine.vault.subjects import any_label
from modeling.encryption.ised_errors import (
    BadInput,
    IsedError,
    Tampered,
    UnsafePath,
    UsageError,
)
from modeling.encryption.primitives import SubjectKey
from modeling.encryption.sealed_image import Metadata
from utils.files import PRIVATE_MODE, atomic_write, check_regular, ensure_folder, remove_leftovers
from utils.logger import Progress

CONTENTS_NAME = "contents.json"
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
) -> Iterator[Revealed]:
    """Write source files bit for bit; where none was kept or opens, write the image instead.

    Args:
        sealed: Folder of sealed files, or one of them.
        folder: Where the files and the list of contents are written.
        keyring: Contains the keys.
        options: How images are converted.
        subject: Label of the subject whose files are revealed; None for all.

    Yields:
        The result for each sealed file that was opened, or could not be opened.

    Raises:
        MissingKey: The keyring has never had a key of the subject.
        UsageError: The output folder contains the files of another subject.
        StorageError: The disk is full, read-only or failing.
    """
    stems = sealed_stems(sealed)
    own = None
    if subject is not None:
        own = frozenset(row.key_id for row in subject_rows(keyring, subject))
    contents = Contents(folder.root, subject)
    contents.begin()
    with contents.writing() as add:
        for revealed in _revealed(stems, folder, keyring, options, own):
            add(revealed)
            yield revealed


def sealed_stems(path: Path) -> list[Path]:
    """Return the sealed files of a folder without their suffixes, sorted, or the one file.

    Raises:
        BadInput: The path does not exist, or the folder contains no sealed files.
    """
    if path.is_file() and path.suffix in (SEALED_SUFFIX, ORIGINAL_SUFFIX):
        return [path.with_suffix("")]
    if not path.exists():
        raise BadInput(f"{path} does not exist; expected a sealed file or a folder of them")
    files = files_in(path, SEALED_SUFFIX) + files_in(path, ORIGINAL_SUFFIX)
    if not files:
        raise BadInput(f"{path} contains no sealed files (*{SEALED_SUFFIX}, *{ORIGINAL_SUFFIX})")
    return sorted({file.with_suffix("") for file in files}, key=attrgetter("name"))


class _OwnKeys:
    """The keys of a keyring that may open files: those of one subject, or all.

    A file may be exchanged after `key_id_of` read it. Its content must not reach another person.
    """

    def __init__(self, keyring: Keyring, own: frozenset[bytes] | None) -> None:
        """Allow the keys with these ids; None for all."""
        self._keyring, self._own = keyring, own

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the active key of a subject."""
        return self._keyring.sealing_key(subject)

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that a public header identifies.

        Raises:
            Tampered: It is the key of another subject.
            MissingKey, RevokedKey, DestroyedKey: There is no usable key.
        """
        self.check(header)
        return self._keyring.opening_key(header)

    def check(self, header: bytes) -> None:
        """Raise Tampered if a public header identifies the key of another subject."""
        row = self._keyring.row_of(header)
        if row is not None and self._own is not None and row.key_id not in self._own:
            raise Tampered("was exchanged for the file of another subject during this command")


def _revealed(
    stems: list[Path],
    folder: OutputFolder,
    keyring: Keyring,
    options: OpenOptions,
    own: frozenset[bytes] | None,
) -> Iterator[Revealed]:
    """Write the files whose keys are ``own``, or all files; see `reveal`."""
    images: list[Path] = []
    keys = _OwnKeys(keyring, own)
    for stem in Progress.over(stems, "Reveal"):
        original, image = (stem.with_name(stem.name + s) for s in (ORIGINAL_SUFFIX, SEALED_SUFFIX))
        is_written = False
        for path in (original, image):
            if is_written or not os.path.lexists(path):
                continue
            try:
                if own is not None and key_id_of(path, keyring) not in own:
                    continue
                if path is image:
                    images.append(path)
                    continue
                yield _write_original(path, folder, keyring, keys)
                is_written = True
            except IsedError as error:
                if error.stops:
                    raise
                yield Revealed(path, error=error)
    content = "anonymized" if options.model is None else "recovered"
    for file in write_opened(unseal(Progress.over(images, "Open"), keys), folder, options):
        if file.image is None or file.error is not None:
            yield Revealed(file.path, error=file.error)
        else:
            metadata = file.image.metadata
            yield Revealed(file.path, content, output_name(metadata, file.path), metadata)


def _write_original(path: Path, folder: OutputFolder, keyring: Keyring, keys: _OwnKeys) -> Revealed:
    """Write a source file under its own path.

    Raises:
        UnsafePath: The path is not that of an image: another program sealed the file.
        IsedError: It cannot be opened or written.
    """
    opened = check_original(path, keyring)
    keys.check(opened.public)
    original = opened.original
    name = original.metadata.path
    if not is_image_name(PurePosixPath(name).name):
        raise UnsafePath(f"path {name!a} is not that of an image")
    folder.write(name, original.content)
    return Revealed(path, "original", name, original.metadata)


class Contents:
    """The list of contents in an output folder: one JSON object, with one line for each file.

    Its first line names the subject, so that the files of two people never share a folder.
    """

    def __init__(self, folder: Path, subject: str | None) -> None:
        """Choose the list; nothing is read or written yet."""
        self.path = folder / CONTENTS_NAME
        self._subject = None if subject is None else any_label(subject)

    def begin(self) -> None:
        """Write a list that is marked as unfinished; a new folder can be entered by its owner only.

        Raises:
            UsageError: The folder has a list of another subject.
        """
        folder = self.path.parent
        if not folder.exists():
            ensure_folder(folder).chmod(0o700)  # subfolders may have the names of people
        remove_leftovers(ensure_folder(folder))  # of a killed run
        if os.path.lexists(self.path):
            self._check_subject()
        with atomic_write(self.path, mode=PRIVATE_MODE) as temporary:
            temporary.write_text(self._first_line(finished=False) + "]}\n", encoding="utf-8")

    @contextmanager
    def writing(self) -> Iterator[Callable[[Revealed], None]]:
        """Yield a function that adds an entry; at the end the list is marked as finished."""
        with (
            atomic_write(self.path, mode=PRIVATE_MODE) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            separator = ""

            def add(revealed: Revealed) -> None:
                nonlocal separator
                file.write(separator + revealed.to_json())
                separator = ",\n"

            file.write(self._first_line(finished=True))
            yield add
            file.write("\n]}\n")

    def _first_line(self, *, finished: bool) -> str:
        head = json.dumps({"subject": self._subject, "finished": finished})
        return f'{head[:-1]}, "files": [\n'

    def _check_subject(self) -> None:
        try:
            check_regular(self.path)
            with self.path.open("rb") as file:
                line = file.readline(_MAX_LINE_BYTES)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be read ({error.strerror})") from None
        if line not in (self._first_line(finished=f).encode() for f in (False, True)):
            raise UsageError(
                f"{self.path} is the list of another subject, or not a list of this command; "
                "choose an empty output folder"
            )
