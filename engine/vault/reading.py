"""Read single sealed files: images, and the source files next to them ("originals")."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import IMAGE, ORIGINAL
from engine.vault.sealed_folder import SEALED_SUFFIX
from modeling.encryption import png_format
from modeling.encryption.ised_errors import (
    BadInput,
    FormatError,
    IsedError,
    MissingKey,
    OutputExists,
    Tampered,
)
from modeling.encryption.primitives import KeyOf
from modeling.encryption.sealed_image import Metadata, OpenedImage, is_under, open_image
from modeling.encryption.sealed_original import (
    MAX_CONTENT_BYTES,
    ORIGINAL_SUFFIX,
    Original,
    file_bytes,
    open_original,
    read_public,
)
from utils.files import check_regular, read_at_most

_BLOCK_BYTES = 1 << 20


def original_name(image_name: str) -> str:
    """Return the name of the sealed source file that belongs to a sealed image."""
    return image_name.removesuffix(SEALED_SUFFIX) + ORIGINAL_SUFFIX


def read_image(path: Path, key_of: KeyOf) -> tuple[OpenedImage, bytes, str]:
    """Open a sealed image; return it, its header chunk, and the SHA-256 (hexadecimal) of the file.

    Raises:
        IsedError: It cannot be read, is not a sealed image, was changed, or has no usable key.
    """
    try:
        stored = png_format.read_content(path)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    sealed = png_format.decode(stored)
    image = open_image(key_of(sealed.chunk), sealed)
    return image, sealed.chunk, hashlib.sha256(stored).hexdigest()


def read_original(path: Path, key_of: KeyOf) -> tuple[Original, bytes, str]:
    """Open a sealed source file; return it, its public header, and the SHA-256 (hexadecimal).

    Takes up to twice the length of the file in memory, which is at most 256 MiB.

    Raises:
        IsedError: See `read_image`. Also Tampered if the file has the name of another image.
    """
    try:
        stored = read_at_most(path, file_bytes(MAX_CONTENT_BYTES))
        if stored is None:
            length = path.stat().st_size
            raise FormatError(f"{length} bytes, more than any sealed original has", 0)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    public = read_public(stored)
    original = open_original(key_of(public), stored, path.stem)
    return original, public, hashlib.sha256(stored).hexdigest()


def check_original(
    path: Path, keyring: Keyring, key_of: KeyOf | None = None
) -> tuple[Original, str]:
    """Open a sealed source file; return it and the SHA-256 (hexadecimal) of the sealed file.

    It is compared with its sealed image, if that can be opened.

    Raises:
        Tampered: The image was sealed from another version of the source file.
        IsedError: See `read_original`.
    """
    original, _, digest = read_original(path, key_of or keyring.opening_key)
    uncounted = partial(keyring.opening_key, counted=False)  # the image is only compared
    try:
        image, _, _ = read_image(path.with_suffix(SEALED_SUFFIX), uncounted)
    except IsedError as error:
        error.of_one_file()
        return original, digest
    if image.metadata != original.metadata:
        raise Tampered(
            "is the original of another version of the image: one of the two was put here from "
            "elsewhere, or `protect --overwrite --keep-original` did not end"
        )
    return original, digest


def header_of(path: Path) -> bytes:
    """Return the public header of a sealed file, without reading the whole file.

    Raises:
        IsedError: The file cannot be read or is not a sealed file.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(png_format.HEAD_BYTES)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    read = png_format.read_public if path.suffix == SEALED_SUFFIX else read_public
    return read(head)


def check_listed(path: Path, digest: str, listed: Mapping[str, str]) -> None:
    """Raise Tampered if another SHA-256 (hexadecimal) is listed for the name of a file."""
    if listed.get(path.name, digest) != digest:
        raise Tampered("is not the file that the manifest lists: it was put here from elsewhere")


def digest_of(path: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a file; raise BadInput if it cannot be read."""
    digest = hashlib.sha256()
    try:
        check_regular(path)
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def key_id_of(path: Path, keyring: Keyring) -> bytes:
    """Return the id of the key that a sealed file is under, without reading the whole file.

    The key may be destroyed in the keyring.

    Raises:
        IsedError: The file cannot be read or is not a sealed file, or its subject is unknown: its
            key is not in the keyring, or its locator was changed.
    """
    public = header_of(path)
    row = keyring.row_of(public)
    if row is None:
        raise MissingKey("no key for this file, so its subject is unknown; run `verify`")
    if row.wrapped is not None and not is_under(keyring.unwrap(row, counted=False), public):
        raise Tampered("its locator was changed, so its subject is unknown; run `verify`")
    return row.key_id


def check_existing(
    path: Path, source: tuple[str, bytes], subject: str, keyring: Keyring, listed: Mapping[str, str]
) -> tuple[Metadata, str]:
    """Return metadata and SHA-256 (hexadecimal) of an output of an earlier run, if it is kept.

    It is a sealed image or sealed source file. ``source`` is path and SHA-256 of the source file,
    ``listed`` the SHA-256 (hexadecimal) by name of the files that the manifest lists.

    Raises:
        OutputExists: It does not open, is of another source or subject (whose erasure would erase
            it too), or is not the file that the manifest lists.
    """
    purpose = IMAGE if path.suffix == SEALED_SUFFIX else ORIGINAL
    try:
        opened = (read_image if purpose == IMAGE else read_original)(path, keyring.opening_key)
    except IsedError as error:
        raise _other(path, f"does not open ({type(error.of_one_file()).__name__})") from None
    content, public, digest = opened
    if (content.metadata.path, content.metadata.source_sha256) != source:
        raise _other(path, f"was made from another version of {source[0]}")
    if keyring.row_of(public) not in keyring.rows_of(subject, purpose):
        raise _other(path, "was sealed for another subject")
    if listed.get(path.name, digest) != digest:
        raise _other(
            path, "is not the file that the manifest lists: it was put there from elsewhere"
        )
    return content.metadata, digest


def check_no_original(path: Path) -> None:
    """Raise OutputExists if an image that is to be sealed has a sealed source file already.

    The source may be another version now; the original would not be that of the new image.
    """
    if os.path.lexists(path):
        raise OutputExists(
            f"{path} exists, the original of an earlier sealed image; give --keep-original too, or "
            "delete it"
        )


def _other(path: Path, problem: str) -> OutputExists:
    return OutputExists(f"{path} exists and {problem}; it was kept, --overwrite replaces it")
