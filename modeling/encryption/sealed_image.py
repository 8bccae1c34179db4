"""The 256 encrypted bytes that travel with a picture: original size, source hash, relative path.

One sealed picture before it is a file: its public header, encrypted metadata and pixels.

Header chunk, 360 bytes::

    offset len
         0   4  "ISED"
         4   1  version = 1
         5   1  kind: what a pixel byte means, see `levels.py`
         6   2  zero
         8  32  salt
        40  16  locator = key_id XOR HMAC(locator key, salt)[:16]
        56  32  commit
        88 256  encrypted metadata
       344  16  tag

Everything before the encrypted metadata, and the size of the picture, is authenticated with it.
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
)
from modeling.encryption.keys import SubjectKey
from modeling.encryption.primitives import (
    COMMIT_BYTES,
    SALT_BYTES,
    TAG_BYTES,
    MessageKey,
    existing_message_key,
    fresh_message_key,
    hmac_sha256,
)

METADATA_BYTES = 256
MAX_PATH_BYTES = 217
_VERSION = 1
_HEAD = struct.Struct(">BHH32sH")
_HASH_BYTES = 32
_UNKNOWN_HASH = bytes(_HASH_BYTES)
_MAX_SIDE = 0xFFFF


@dataclass(frozen=True)
class Metadata:
    """What is known about the source of a sealed picture.

    Attributes:
        path: Relative path with forward slashes; empty if there was no file.
        source_sha256: SHA-256 of the source file; zeros if there was no file.
        orig_h, orig_w: Size of the upright source picture in pixels; 0 means unknown.
    """

    path: str = ""
    source_sha256: bytes = _UNKNOWN_HASH
    orig_h: int = 0
    orig_w: int = 0

    def to_bytes(self) -> bytes:
        """Return the 256 bytes.

        Raises:
            UnsafePath: The path is absolute, has `..` or NUL, or is not valid UTF-8.
            PathTooLong: The path has more than 217 bytes.
        """
        check_relative_path(self.path)
        encoded = self.path.encode()
        if not 0 <= self.orig_h <= _MAX_SIDE or not 0 <= self.orig_w <= _MAX_SIDE:
            raise ValueError(f"original size {self.orig_w} x {self.orig_h}; at most 65535 a side")
        head = _HEAD.pack(_VERSION, self.orig_h, self.orig_w, self.source_sha256, len(encoded))
        return (head + encoded).ljust(METADATA_BYTES, b"\0")

    @classmethod
    def from_bytes(cls, stored: bytes) -> Metadata:
        """Read the 256 bytes of an authenticated file.

        Raises:
            Tampered: They are not as this program writes them: whoever sealed them did not use it.
            UnsafePath, PathTooLong: The path would leave the output folder.
        """
        version, orig_h, orig_w, digest, count = _HEAD.unpack_from(stored)
        if len(stored) != METADATA_BYTES or version != _VERSION:
            raise Tampered(f"metadata version {version}; expected {_VERSION}")
        if count > MAX_PATH_BYTES:
            raise PathTooLong(f"metadata path of {count} bytes; at most {MAX_PATH_BYTES}")
        end = _HEAD.size + count
        if any(stored[end:]):
            raise Tampered("metadata padding is not zero")
        try:
            path = stored[_HEAD.size : end].decode()
        except UnicodeDecodeError:
            raise UnsafePath("metadata path is not UTF-8") from None
        check_relative_path(path)
        return cls(path=path, source_sha256=digest, orig_h=orig_h, orig_w=orig_w)


def check_relative_path(path: str) -> None:
    """Refuse a path that a reader could not follow safely below its own folder.

    Raises:
        UnsafePath: It is absolute, has `..`, a backslash, a control character or no UTF-8 form.
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
    odd = any(ord(char) < 32 or char in "\\\x7f" for char in path)
    if pure.is_absolute() or ".." in pure.parts or odd or (path and str(pure) != path):
        raise UnsafePath(
            f"path {path!a} is not a plain relative path; absolute paths, '..', backslashes and "
            "control characters are refused"
        )


MAGIC = b"ISED"
VERSION = 1
KIND_RGB8 = 0
KIND_TANH = 1
KINDS = (KIND_RGB8, KIND_TANH)
CONTEXT = "file"

LOCATOR_BYTES = 16
_SALT_AT = 8
_LOCATOR_AT = _SALT_AT + SALT_BYTES
_COMMIT_AT = _LOCATOR_AT + LOCATOR_BYTES
PUBLIC_BYTES = _COMMIT_AT + COMMIT_BYTES
_TAG_AT = PUBLIC_BYTES + METADATA_BYTES
CHUNK_BYTES = _TAG_AT + TAG_BYTES

MAX_SIDE_PX = 16_384
MAX_PIXELS = 2**24

_AAD = b"securereid/ised"
_SIZE = struct.Struct(">IIBBBBB")  # IHDR: width, height, 8 bit, RGB, deflate, filter, no interlace


@dataclass(frozen=True)
class SealedPicture:
    """A picture as everybody may see it.

    Attributes:
        width, height: Size in pixels.
        chunk: Header chunk, 360 bytes.
        pixels: Ciphertext, 3 * width * height bytes, row by row.
    """

    width: int
    height: int
    chunk: bytes
    pixels: bytes

    @property
    def kind(self) -> int:
        """What a pixel byte means."""
        return self.chunk[5]


@dataclass(frozen=True)
class OpenedPicture:
    """A picture after authentication.

    Attributes:
        pixels: uint8 (H, W, 3).
        kind: What a pixel byte means.
        metadata: What travelled with it.
    """

    pixels: NDArray[np.uint8]
    kind: int
    metadata: Metadata


def image_header(width: int, height: int) -> bytes:
    """Return the 13 bytes of a PNG's IHDR for an RGB8 picture."""
    return _SIZE.pack(width, height, 8, 2, 0, 0, 0)


def check_size(width: int, height: int, offset: int = -1) -> None:
    """Refuse sizes outside 1..16384 a side or above 2^24 pixels.

    Raises:
        FormatError: A side is zero.
        TooLarge: It is more than the format allows.
    """
    if not width or not height:
        raise FormatError(
            f"picture of {width} x {height} pixels; both sides are at least 1", offset
        )
    if width > MAX_SIDE_PX or height > MAX_SIDE_PX or width * height > MAX_PIXELS:
        raise TooLarge(
            f"picture of {width} x {height} pixels; at most {MAX_SIDE_PX} a side and "
            f"{MAX_PIXELS} in all, scale it down",
            offset,
        )


def check_chunk(chunk: bytes, offset: int = -1) -> None:
    """Refuse a header chunk whose constant fields are not those of version 1.

    Args:
        chunk: The 360 bytes.
        offset: Where they begin in a file, for messages.

    Raises:
        FormatError, UnsupportedVersion: A field is wrong.
    """

    def at(place: int) -> int:
        return -1 if offset < 0 else offset + place

    if len(chunk) != CHUNK_BYTES:
        raise FormatError(f"header chunk of {len(chunk)} bytes; expected {CHUNK_BYTES}", at(0))
    if chunk[:4] != MAGIC:
        raise FormatError("header chunk does not begin with ISED", at(0))
    if chunk[4] != VERSION:
        raise UnsupportedVersion(f"file version {chunk[4]}; this program reads {VERSION}", at(4))
    if chunk[5] not in KINDS:
        raise FormatError(f"pixel kind {chunk[5]}; expected 0 or 1", at(5))
    if chunk[6:8] != b"\0\0":
        raise FormatError("reserved header bytes are not zero", at(6))


def mask_locator(locator_key: bytes, salt: bytes, key_id: bytes) -> bytes:
    """Turn a key's name into a locator, or a locator back into the name (16 bytes each).

    Without the locator key two files of one person look as unrelated as any other two.
    """
    mask = hmac_sha256(locator_key, salt)[:LOCATOR_BYTES]
    return bytes(a ^ b for a, b in zip(key_id, mask, strict=True))


def key_id_of(chunk: bytes, locator_key: bytes) -> bytes:
    """Return the name of the key that a header chunk points to."""
    salt, locator, _ = public_fields(chunk)
    return mask_locator(locator_key, salt, locator)


def public_fields(chunk: bytes) -> tuple[bytes, bytes, bytes]:
    """Return (salt, locator, commit) of a header chunk."""
    return (
        chunk[_SALT_AT:_LOCATOR_AT],
        chunk[_LOCATOR_AT:_COMMIT_AT],
        chunk[_COMMIT_AT:PUBLIC_BYTES],
    )


def seal_picture(
    key: SubjectKey, pixels: NDArray[np.uint8], kind: int, metadata: Metadata
) -> SealedPicture:
    """Encrypt a picture under a fresh salt.

    Args:
        key: The subject's active key.
        pixels: uint8 (H, W, 3).
        kind: KIND_RGB8 or KIND_TANH.
        metadata: Encrypted with it.

    Raises:
        TooLarge: More pixels than the format allows.
    """
    message_key = fresh_message_key(key.key, CONTEXT)
    return _seal_under(message_key, key, pixels, kind, metadata)


def open_picture(key: bytes, picture: SealedPicture) -> OpenedPicture:
    """Decrypt and authenticate a picture.

    Raises:
        FormatError: The header chunk is not of version 1.
        WrongKey: It was sealed under another key.
        Tampered: Anything in it was changed.
    """
    chunk = picture.chunk
    check_chunk(chunk)
    salt, _, commit = public_fields(chunk)
    message_key = existing_message_key(key, CONTEXT, salt, commit)
    ciphertext = b"".join((picture.pixels, memoryview(chunk)[PUBLIC_BYTES:]))
    message = message_key.decrypt(_aad(chunk, picture.width, picture.height), ciphertext)
    count = 3 * picture.width * picture.height
    pixels = np.frombuffer(message, np.uint8, count).reshape(picture.height, picture.width, 3)
    return OpenedPicture(pixels, chunk[5], Metadata.from_bytes(message[count:]))


def _seal_under(
    message_key: MessageKey,
    key: SubjectKey,
    pixels: NDArray[np.uint8],
    kind: int,
    metadata: Metadata,
) -> SealedPicture:
    """Seal under a given message key; apart from known-answer tests only `seal_picture` does."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}; expected uint8 (H, W, 3)")
    if kind not in KINDS:
        raise ValueError(f"pixel kind {kind}; expected 0 or 1")
    height, width = pixels.shape[:2]
    check_size(width, height)
    locator = mask_locator(key.locator_key, message_key.salt, key.key_id)
    public = b"".join(
        (MAGIC, bytes((VERSION, kind, 0, 0)), message_key.salt, locator, message_key.commit)
    )
    plaintext = b"".join((np.ascontiguousarray(pixels).data, metadata.to_bytes()))
    ciphertext = message_key.encrypt(_aad(public, width, height), plaintext)
    count = pixels.size
    return SealedPicture(width, height, public + ciphertext[count:], ciphertext[:count])


def _aad(chunk: bytes, width: int, height: int) -> bytes:
    """Return what is authenticated in the clear."""
    return _AAD + chunk[:PUBLIC_BYTES] + image_header(width, height)
