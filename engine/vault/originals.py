"""Sealed source files next to the sealed images: reading, checking, and whose a file is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from engine.vault.keyring import Keyring
from engine.vault.sealed_folder import SEALED_SUFFIX
from modeling.encryption import png_format
from modeling.encryption.ised_errors import (
    BadInput,
    FormatError,
    IsedError,
    MissingKey,
    Tampered,
)
from modeling.encryption.primitives import KeySource
from modeling.encryption.sealed_image import Metadata, is_under, open_image
from modeling.encryption.sealed_original import (
    MAX_CONTENT_BYTES,
    SUFFIX,
    Original,
    file_bytes,
    open_original,
    read_public,
)
from utils.files import check_regular

ORIGINAL_SUFFIX = SUFFIX


@dataclass(frozen=True)
class OpenedOriginal:
    """A sealed source file that was opened."""

    original: Original  # its content and metadata
    public: bytes  # public header of the sealed file, 88 bytes
    digest: str  # SHA-256 of the sealed file in hexadecimal


def original_name(image_name: str) -> str:
    """Return the name of the sealed source file that belongs to a sealed image."""
    return image_name.removesuffix(SEALED_SUFFIX) + ORIGINAL_SUFFIX


def read_original(path: Path, keys: KeySource) -> OpenedOriginal:
    """Open a sealed source file.

    Takes up to twice the length of the file in memory, which is at most 256 MiB.

    Raises:
        BadInput: It cannot be read.
        FormatError, UnsupportedVersion, WrongKey, Tampered: It is not a sealed source file, or was
            changed, or is under another name.
        MissingKey, RevokedKey, DestroyedKey: There is no usable key.
    """
    longest = file_bytes(MAX_CONTENT_BYTES)
    try:
        check_regular(path)
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            stored = b"" if length > longest else file.read(longest + 1)  # it may have grown
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    if length > longest:
        raise FormatError(f"{length} bytes, more than any sealed original has", 0)
    public = read_public(stored)
    original = open_original(keys.opening_key(public), stored, path.stem)
    return OpenedOriginal(original, public, hashlib.sha256(stored).hexdigest())


def check_original(path: Path, keyring: Keyring) -> OpenedOriginal:
    """Open a sealed source file and compare it with its sealed image, if that can be opened.

    Raises:
        Tampered: The image was sealed from another version of the source file.
        IsedError: See `read_original`.
    """
    opened = read_original(path, keyring)
    metadata = image_metadata(path.with_suffix(SEALED_SUFFIX), keyring)
    if metadata not in (None, opened.original.metadata):
        raise Tampered(
            "is the original of another version of the image: one of the two was put here from "
            "elsewhere, or `protect --overwrite --keep-original` did not end"
        )
    return opened


def image_metadata(path: Path, keyring: Keyring) -> Metadata | None:
    """Return the metadata of a sealed image; None if it cannot be opened.

    The audit log does not count the image: it is only compared.
    """
    try:
        sealed = png_format.decode(png_format.read_content(path))
        row = keyring.row_of(sealed.chunk)
        if row is None:
            return None
        row.check_usable()
        return open_image(keyring.unwrap(row), sealed).metadata
    except (OSError, IsedError) as error:
        if isinstance(error, IsedError) and error.stops:
            raise
        return None


def key_id_of(path: Path, keyring: Keyring) -> bytes:
    """Return the id of the key that a file was sealed under, without reading the whole file.

    Args:
        path: A sealed image or a sealed source file.
        keyring: The key may be destroyed in it.

    Raises:
        IsedError: The file cannot be read or is not a sealed file, or its subject is unknown: its
            key is not in the keyring, or its locator was changed.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(png_format.HEAD_BYTES)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    read = png_format.read_public if path.suffix == SEALED_SUFFIX else read_public
    public = read(head)
    row = keyring.row_of(public)
    if row is None:
        raise MissingKey("no key for this file, so its subject is unknown; run `verify`")
    if row.wrapped is not None and not is_under(keyring.unwrap(row, counted=False), public):
        raise Tampered("its locator was changed, so its subject is unknown; run `verify`")
    return row.key_id
