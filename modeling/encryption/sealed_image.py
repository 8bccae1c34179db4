"""One sealed image: public header, encrypted metadata and encrypted pixels (docs/FORMAT.md).

The header chunk has 360 bytes::

    offset len
         0   4  "ISED"
         4   1  version = 1
         5   1  kind = 1: pixel byte q is the value q / 127.5 - 1
         6   2  zero
         8  32  salt
        40  16  locator = key_id XOR HMAC(locator key, salt)[:16]
        56  32  commit
        88 256  encrypted metadata: original size, hash of the source, relative path
       344  16  tag

The tag authenticates pixels and metadata, everything before them, and the size of the image.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from modeling.encryption.ised_errors import (
    FormatError,
    PathTooLong,
    Tampered,
    TooLarge,
    UnsafePath,
    UnsupportedVersion,
    WrongKey,
)
from modeling.encryption.primitives import (
    COMMIT_BYTES,
    SALT_BYTES,
    TAG_BYTES,
    MessageKey,
    SubjectKey,
    existing_message_key,
    fresh_message_key,
    hmac_sha256,
)

MAGIC = b"ISED"
VERSION = 1
KIND = 1
CONTEXT = "file"

LOCATOR_BYTES = 16
METADATA_BYTES = 256
MAX_PATH_BYTES = 217
_PUBLIC = struct.Struct(f"8x {SALT_BYTES}s {LOCATOR_BYTES}s {COMMIT_BYTES}s")
PUBLIC_BYTES = _PUBLIC.size
CHUNK_BYTES = PUBLIC_BYTES + METADATA_BYTES + TAG_BYTES

MAX_SIDE_PX = 16_384
MAX_PIXELS = 2**24

_AAD = b"securereid/ised"
# IHDR of a PNG: width, height, 8 bit, RGB, deflate, filter, no interlace.
_IHDR = struct.Struct(">IIBBBBB")

_METADATA_VERSION = 1
# Version, height, width, SHA-256 of the source, length of the path; the path follows.
_METADATA_HEAD = struct.Struct(">BHH32sH")
_UNKNOWN_HASH = bytes(32)
_MAX_ORIGINAL_SIDE = 0xFFFF


@dataclass(frozen=True)
class Metadata:
    """Metadata of the source of a sealed image."""

    path: str = ""  # relative path with forward slashes; empty if there was no file
    source_sha256: bytes = _UNKNOWN_HASH  # SHA-256 of the source file; zeros if there was no file
    orig_h: int = 0  # height of the upright source image in pixels; 0 if unknown
    orig_w: int = 0  # its width

    def to_bytes(self) -> bytes:
        """Return the 256 bytes of the file format.

        Raises:
            UnsafePath, PathTooLong: See `check_relative_path`.
            ValueError: A side of the original size is above 65,535.
        """
        check_relative_path(self.path)
        encoded = self.path.encode()
        if not 0 <= self.orig_h <= _MAX_ORIGINAL_SIDE or not 0 <= self.orig_w <= _MAX_ORIGINAL_SIDE:
            raise ValueError(f"original size {self.orig_w} x {self.orig_h}; at most 65535 a side")
        fields = (_METADATA_VERSION, self.orig_h, self.orig_w, self.source_sha256, len(encoded))
        return (_METADATA_HEAD.pack(*fields) + encoded).ljust(METADATA_BYTES, b"\0")

    @classmethod
    def from_bytes(cls, stored: bytes) -> Metadata:
        """Parse the 256 bytes of an authenticated file.

        Raises:
            Tampered: This program does not write such metadata: another program sealed the file.
            UnsafePath, PathTooLong: The path would leave the output folder.
        """
        version, orig_h, orig_w, digest, path_bytes = _METADATA_HEAD.unpack_from(stored)
        if len(stored) != METADATA_BYTES or version != _METADATA_VERSION:
            raise Tampered(f"metadata version {version}; expected {_METADATA_VERSION}")
        if path_bytes > MAX_PATH_BYTES:
            raise PathTooLong(f"metadata path of {path_bytes} bytes; at most {MAX_PATH_BYTES}")
        end = _METADATA_HEAD.size + path_bytes
        if any(stored[end:]):
            raise Tampered("metadata padding is not zero")
        try:
            path = stored[_METADATA_HEAD.size : end].decode()
        except UnicodeDecodeError:
            raise UnsafePath("metadata path is not UTF-8") from None
        check_relative_path(path)
        return cls(path=path, source_sha256=digest, orig_h=orig_h, orig_w=orig_w)


def check_relative_path(path: str) -> None:
    """Raise unless a path is a plain relative path, which is safe to write below any folder.

    Raises:
        UnsafePath: It is absolute, contains ``..``, a backslash or a control character, or has no
            UTF-8 form.
        PathTooLong: It has more than 217 bytes in UTF-8.
    """
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise UnsafePath(f"path {path!a} is not valid UTF-8; rename the file") from None
    if len(encoded) > MAX_PATH_BYTES:
        raise PathTooLong(
            f"path {path!a} has {len(encoded)} bytes; at most {MAX_PATH_BYTES}, shorten the folders"
        )
    pure = PurePosixPath(path)
    unsafe = any(ord(char) < 32 or char in "\\\x7f" for char in path)
    if pure.is_absolute() or ".." in pure.parts or unsafe or (path and str(pure) != path):
        raise UnsafePath(
            f"path {path!a} is not a plain relative path; absolute paths, '..', backslashes and "
            "control characters are refused"
        )


@dataclass(frozen=True)
class SealedImage:
    """A sealed image as anyone can read it."""

    width: int  # size in pixels
    height: int  # size in pixels
    chunk: bytes  # header chunk, 360 bytes
    pixels: bytes  # ciphertext, 3 * width * height bytes, row by row


@dataclass(frozen=True)
class OpenedImage:
    """A sealed image after authentication and decryption."""

    pixels: NDArray[np.uint8]  # uint8 (H, W, 3)
    metadata: Metadata  # metadata of the source


@dataclass(frozen=True)
class FileKey:
    """The key of one file, made by `new_file_key`; worker processes need no other key."""

    message_key: MessageKey  # key, salt and commitment of the file
    locator: bytes  # masked id of the subject's key


def image_header(width: int, height: int) -> bytes:
    """Return the 13 bytes of a PNG's IHDR for an 8-bit RGB image."""
    return _IHDR.pack(width, height, 8, 2, 0, 0, 0)


def check_size(width: int, height: int, offset: int = -1) -> None:
    """Raise if a side is not in 1..16384, or if there are more than 2^24 pixels."""
    if not width or not height:
        raise FormatError(f"image of {width} x {height} pixels; both sides are at least 1", offset)
    if width > MAX_SIDE_PX or height > MAX_SIDE_PX or width * height > MAX_PIXELS:
        raise TooLarge(
            f"image of {width} x {height} pixels; at most {MAX_SIDE_PX} a side and "
            f"{MAX_PIXELS} in all, scale it down",
            offset,
        )


def check_chunk(chunk: bytes, offset: int = -1) -> None:
    """Raise if the constant fields of a header chunk are not those of version 1."""
    if len(chunk) != CHUNK_BYTES:
        raise FormatError(f"header chunk of {len(chunk)} bytes; expected {CHUNK_BYTES}", offset)
    check_public(chunk, KIND, offset)


def check_public(public: bytes, kind: int, offset: int = -1) -> None:
    """Raise if magic, version, kind or reserved bytes of a public header are not those expected.

    The kind is 1 for an image, 2 for an original. The offset is the header's in the file.
    """

    def at(position: int) -> int:
        return -1 if offset < 0 else offset + position

    if public[:4] != MAGIC:
        raise FormatError("the header does not begin with ISED", at(0))
    if public[4] != VERSION:
        raise UnsupportedVersion(f"file version {public[4]}; this program reads {VERSION}", at(4))
    if public[5] != kind:
        raise FormatError(f"kind {public[5]}; expected {kind}", at(5))
    if public[6:8] != b"\0\0":
        raise FormatError("reserved header bytes are not zero", at(6))


def public_header(key: FileKey, kind: int) -> bytes:
    """Return the 88 bytes that a file begins with: magic, version, kind, salt, locator, commit."""
    constant = MAGIC + bytes((VERSION, kind, 0, 0))
    return constant + key.message_key.salt + key.locator + key.message_key.commit


def mask_locator(locator_key: bytes, salt: bytes, key_id: bytes) -> bytes:
    """Return the locator of a key id, or the key id of a locator (16 bytes each).

    Without the locator key, two files of one person look as unrelated as any other two.
    """
    mask = hmac_sha256(locator_key, salt)[:LOCATOR_BYTES]
    return bytes(a ^ b for a, b in zip(key_id, mask, strict=True))


def key_id_of(chunk: bytes, locator_key: bytes) -> bytes:
    """Return the id of the key that a header chunk's locator identifies."""
    salt, locator, _ = public_fields(chunk)
    return mask_locator(locator_key, salt, locator)


def public_fields(chunk: bytes) -> tuple[bytes, bytes, bytes]:
    """Return (salt, locator, commit) of a header chunk."""
    salt, locator, commit = _PUBLIC.unpack_from(chunk)
    return salt, locator, commit


def is_under(key: bytes, chunk: bytes) -> bool:
    """Return whether a file was sealed under a subject's key, according to its commitment."""
    salt, _, commit = public_fields(chunk)
    try:
        existing_message_key(key, CONTEXT, salt, commit)
    except WrongKey:
        return False
    return True


def seal_image(key: SubjectKey, pixels: NDArray[np.uint8], metadata: Metadata) -> SealedImage:
    """Encrypt an image, uint8 (H, W, 3), and its metadata under a subject's key and a fresh salt.

    Raises:
        TooLarge: The image has more pixels than the format allows.
    """
    return seal_with(new_file_key(key), pixels, metadata)


def new_file_key(key: SubjectKey) -> FileKey:
    """Return a fresh key for one file; it reveals nothing about the subject's other files."""
    return _file_key(fresh_message_key(key.key, CONTEXT), key)


def open_image(key: bytes, image: SealedImage) -> OpenedImage:
    """Decrypt and authenticate a sealed image; raise FormatError, WrongKey or Tampered."""
    chunk = image.chunk
    check_chunk(chunk)
    salt, _, commit = public_fields(chunk)
    message_key = existing_message_key(key, CONTEXT, salt, commit)
    ciphertext = b"".join((image.pixels, memoryview(chunk)[PUBLIC_BYTES:]))
    message = message_key.decrypt(_aad(chunk, image.width, image.height), ciphertext)
    count = 3 * image.width * image.height
    pixels = np.frombuffer(message, np.uint8, count).reshape(image.height, image.width, 3)
    return OpenedImage(pixels, Metadata.from_bytes(message[count:]))


def _file_key(message_key: MessageKey, key: SubjectKey) -> FileKey:
    """Return the file key of a given message key. Tests call this directly, for known answers."""
    return FileKey(message_key, mask_locator(key.locator_key, message_key.salt, key.key_id))


def seal_with(key: FileKey, pixels: NDArray[np.uint8], metadata: Metadata) -> SealedImage:
    """Encrypt an image and its metadata under the key of its file; see `seal_image`.

    Call it once per key: a second message under one key would reveal both.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}; expected uint8 (H, W, 3)")
    height, width = pixels.shape[:2]
    check_size(width, height)
    message_key = key.message_key
    public = public_header(key, KIND)
    plaintext = b"".join((np.ascontiguousarray(pixels).data, metadata.to_bytes()))
    ciphertext = message_key.encrypt(_aad(public, width, height), plaintext)
    count = pixels.size
    return SealedImage(width, height, public + ciphertext[count:], ciphertext[:count])


def _aad(chunk: bytes, width: int, height: int) -> bytes:
    """Return the bytes that are authenticated but not encrypted."""
    return _AAD + chunk[:PUBLIC_BYTES] + image_header(width, height)
