"""Outputs that exist before a protect run: whether they are what the run would write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import IMAGE, ORIGINAL
from engine.vault.originals import read_original
from modeling.encryption import png_format
from modeling.encryption.ised_errors import IsedError, OutputExists
from modeling.encryption.sealed_image import Metadata, open_image


class ExistingOutputs:
    """The files of an output folder. Each method raises OutputExists unless its file is kept.

    A file is not kept if it does not open, was made from another source, was sealed for another
    subject (whose erasure would erase it too), or is not the file that the manifest lists.
    """

    def __init__(self, folder: Path, keyring: Keyring, listed: Mapping[str, str]) -> None:
        """Use the SHA-256 (hexadecimal) by name of the files that the manifest lists."""
        self._folder, self._keyring, self._listed = folder, keyring, listed

    def image(
        self, name: str, subject: str, path: str, source_sha256: bytes
    ) -> tuple[Metadata, str]:
        """Return metadata and SHA-256 (hexadecimal) of the sealed image of a source."""
        file = self._folder / name
        try:
            content = png_format.read_content(file)
            sealed = png_format.decode(content)
            metadata = open_image(self._keyring.opening_key(sealed.chunk), sealed).metadata
        except (IsedError, OSError) as error:
            raise _unusable(file, error) from None
        if (metadata.path, metadata.source_sha256) != (path, source_sha256):
            raise _other(file, f"was made from another version of {path}")
        digest = hashlib.sha256(content).hexdigest()
        self._check(file, digest, sealed.chunk, subject, IMAGE)
        return metadata, digest

    def original(self, name: str, subject: str, metadata: Metadata) -> str:
        """Return the SHA-256 (hexadecimal) of the sealed source file of an image."""
        file = self._folder / name
        try:
            opened = read_original(file, self._keyring)
        except IsedError as error:
            raise _unusable(file, error) from None
        if opened.original.metadata != metadata:
            raise _other(file, f"was made from another version of {metadata.path}")
        self._check(file, opened.digest, opened.public, subject, ORIGINAL)
        return opened.digest

    def check_no_original(self, name: str) -> None:
        """Raise OutputExists if an image that is to be sealed has a sealed source file already.

        The source may be another version now; the original would not be that of the new image.
        """
        file = self._folder / name
        if os.path.lexists(file):
            raise OutputExists(
                f"{file} exists, the original of an earlier sealed image; give --keep-original "
                "too, or delete it"
            )

    def _check(self, file: Path, digest: str, header: bytes, subject: str, purpose: str) -> None:
        """Raise OutputExists if a file is that of another subject, or not the manifest's."""
        row = self._keyring.row_of(header)
        if row not in self._keyring.rows_of(subject, purpose):
            raise _other(file, "was sealed for another subject")
        if self._listed.get(file.name, digest) != digest:
            raise _other(
                file, "is not the file that the manifest lists: it was put there from elsewhere"
            )


def _unusable(file: Path, error: Exception) -> IsedError:
    """Return the error for a file that does not open, or an error that ends the run."""
    if isinstance(error, IsedError) and error.stops:
        return error
    return _other(file, f"does not open ({type(error).__name__})")


def _other(file: Path, problem: str) -> OutputExists:
    return OutputExists(f"{file} exists and {problem}; it was kept, --overwrite replaces it")
