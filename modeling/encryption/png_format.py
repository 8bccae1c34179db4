"""The sealed file: a standard 8-bit RGB PNG whose pixels are the ciphertext (docs/FORMAT.md).

::

    signature | IHDR | isEd (360 bytes) | IDAT | IEND
    IDAT = 78 01 | stored deflate blocks of 65,535 bytes, the last one shorter | Adler-32

There is exactly one way to write an image. A reader knows every length from the size alone and
parses by position. Nothing is decompressed, so a small file cannot take much memory, and `decode`
accepts only what `encode` writes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modeling.encryption.ised_errors import FormatError, NotProtected
from modeling.encryption.sealed_image import (
    CHUNK_BYTES,
    MAX_PIXELS,
    MAX_SIDE_PX,
    PUBLIC_BYTES,
    SealedImage,
    check_chunk,
    check_size,
    image_header,
)
from utils.files import read_at_most

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNK_NAME = b"isEd"
_LENGTH = struct.Struct(">I")
_BLOCK = struct.Struct("<BHH")
_ZLIB_HEADER = b"\x78\x01"
_BLOCK_BYTES = 65_535
_FRAME_BYTES = 12  # of a PNG chunk: length, name, CRC
_IHDR_AT = len(SIGNATURE)
_IHDR_BYTES = 13
_ISED_AT = _IHDR_AT + _FRAME_BYTES + _IHDR_BYTES
_IDAT_AT = _ISED_AT + _FRAME_BYTES + CHUNK_BYTES
HEAD_BYTES = _IDAT_AT  # everything before the pixels
_IEND = _LENGTH.pack(0) + b"IEND" + _LENGTH.pack(zlib.crc32(b"IEND"))
_EDITOR_HINT = "was it re-saved by an image editor?"


def encode(image: SealedImage) -> bytes:
    """Return the bytes of the file of a sealed image."""
    rows = np.zeros((image.height, 1 + 3 * image.width), np.uint8)  # column 0: filter byte 0
    rows[:, 1:] = np.frombuffer(image.pixels, np.uint8).reshape(image.height, -1)
    raw = rows.data.cast("B")
    deflated: list[bytes | memoryview] = [_ZLIB_HEADER]
    for start, header in _block_headers(len(raw)):
        deflated += (header, raw[start : start + _BLOCK_BYTES])
    deflated.append(_LENGTH.pack(zlib.adler32(raw)))
    return b"".join(
        (
            SIGNATURE,
            *_chunk(b"IHDR", image_header(image.width, image.height)),
            *_chunk(CHUNK_NAME, image.chunk),
            *_chunk(b"IDAT", *deflated),
            _IEND,
        )
    )


def decode(data: bytes) -> SealedImage:
    """Parse a file. The result is well formed, but not yet authenticated.

    Raises:
        NotProtected: The file has no isEd chunk.
        TooLarge, UnsupportedVersion, FormatError: It is not exactly one file of version 1.
    """
    width, height = _read_size(data)
    _expect_frame(data, _ISED_AT, CHUNK_NAME, CHUNK_BYTES)
    idat_bytes = _idat_bytes(width, height)
    _expect_frame(data, _IDAT_AT, b"IDAT", idat_bytes)
    expected = file_bytes(width, height)
    if len(data) < expected:
        raise FormatError(f"truncated: {len(data)} of {expected} bytes", len(data))
    if len(data) > expected:
        raise FormatError(f"{len(data) - expected} bytes after the end", expected)
    view = memoryview(data)
    _check_crc(view, _ISED_AT, CHUNK_BYTES)
    chunk = data[_ISED_AT + 8 : _ISED_AT + 8 + CHUNK_BYTES]
    check_chunk(chunk, _ISED_AT + 8)
    _check_crc(view, _IDAT_AT, idat_bytes)
    if view[-len(_IEND) :] != _IEND:
        raise FormatError(f"the last chunk is not IEND; {_EDITOR_HINT}", expected - len(_IEND))
    idat = view[_IDAT_AT + 8 : _IDAT_AT + 8 + idat_bytes]
    return SealedImage(width, height, chunk, _read_pixels(idat, width, height))


def read_content(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file, which is not read if it is longer than any sealed image.

    Raises:
        OSError: It cannot be read.
        NotProtected, TooLarge, FormatError: It is too long.
    """
    content = read_at_most(path, file_bytes_at_most())
    if content is None:
        with Path(path).open("rb") as file:
            _read_size(file.read(HEAD_BYTES))  # the more specific error, if there is one
            length = os.fstat(file.fileno()).st_size
        raise FormatError(f"{length} bytes, more than any sealed image has", 0)
    return content


def read_public(head: bytes) -> bytes:
    """Return the public header (88 bytes) in the first HEAD_BYTES, or raise FormatError."""
    _read_size(head)
    _expect_frame(head, _ISED_AT, CHUNK_NAME, CHUNK_BYTES)
    chunk = head[_ISED_AT + 8 : _ISED_AT + 8 + CHUNK_BYTES]
    check_chunk(chunk, _ISED_AT + 8)
    return chunk[:PUBLIC_BYTES]


def file_bytes(width: int, height: int) -> int:
    """Return the length of a file in bytes: at 256 x 128 pixels, 701 more than the pixels."""
    return _IDAT_AT + _FRAME_BYTES + _idat_bytes(width, height) + len(_IEND)


def file_bytes_at_most() -> int:
    """Return the length of the longest possible file."""
    # the most rows, so the most filter bytes
    return file_bytes(MAX_PIXELS // MAX_SIDE_PX, MAX_SIDE_PX)


def _block_headers(raw_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield (start in the raw data, 5-byte header) of each stored block."""
    for start in range(0, raw_bytes, _BLOCK_BYTES):
        length = min(_BLOCK_BYTES, raw_bytes - start)
        yield start, _BLOCK.pack(start + length == raw_bytes, length, length ^ 0xFFFF)


def _idat_bytes(width: int, height: int) -> int:
    raw_bytes = height * (1 + 3 * width)
    blocks = -(-raw_bytes // _BLOCK_BYTES)
    return len(_ZLIB_HEADER) + blocks * _BLOCK.size + raw_bytes + 4


def _chunk(name: bytes, *parts: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
    """Return the pieces of a PNG chunk with length and CRC, without copying its data."""
    crc = zlib.crc32(name)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return (_LENGTH.pack(sum(map(len, parts))), name, *parts, _LENGTH.pack(crc))


def _read_size(data: bytes) -> tuple[int, int]:
    """Check signature and IHDR; return (width, height)."""
    if not data.startswith(SIGNATURE):
        if SIGNATURE.startswith(data):
            raise FormatError("truncated: the file is empty or cut in the signature", len(data))
        error = FormatError if CHUNK_NAME in data else NotProtected
        raise error(f"not a PNG file, so not a sealed image; {_EDITOR_HINT}", 0)
    _expect_frame(data, _IHDR_AT, b"IHDR", _IHDR_BYTES)
    if len(data) < _ISED_AT:
        raise FormatError(f"truncated: {len(data)} bytes end inside the header", len(data))
    _check_crc(memoryview(data), _IHDR_AT, _IHDR_BYTES)
    width, height = struct.unpack_from(">II", data, _IHDR_AT + 8)
    if data[_IHDR_AT + 8 : _ISED_AT - 4] != image_header(width, height):
        raise _foreign(data, "the image is not 8-bit RGB without interlace", _IHDR_AT + 16)
    check_size(width, height, _IHDR_AT + 8)
    return width, height


def _expect_frame(data: bytes, at: int, name: bytes, length: int) -> None:
    frame = data[at : at + 8]
    if len(frame) < 8:
        raise FormatError(f"truncated: {len(data)} bytes end before {name.decode()}", len(data))
    if frame[4:] != name:
        raise _foreign(data, f"expected the chunk {name.decode()}", at + 4)
    if frame[:4] != _LENGTH.pack(length):
        got = _LENGTH.unpack(frame[:4])[0]
        raise FormatError(
            f"chunk {name.decode()} of {got} bytes; expected {length}; {_EDITOR_HINT}", at
        )


def _foreign(data: bytes, what: str, offset: int) -> FormatError:
    """Return the error for a PNG of another layout: NotProtected if it has no isEd chunk."""
    at = len(SIGNATURE)
    while at + 8 <= len(data):
        if data[at + 4 : at + 8] == CHUNK_NAME:
            return FormatError(f"{what}; {_EDITOR_HINT}", offset)
        at += _FRAME_BYTES + _LENGTH.unpack_from(data, at)[0]
    return NotProtected(
        f"{what}, and no isEd chunk follows: not a sealed image; {_EDITOR_HINT}", offset
    )


def _check_crc(view: memoryview, at: int, length: int) -> None:
    end = at + 8 + length
    if _LENGTH.pack(zlib.crc32(view[at + 4 : end])) != view[end : end + 4]:
        name = bytes(view[at + 4 : at + 8]).decode()
        raise FormatError(f"checksum of chunk {name} is wrong: the file is damaged", end)


def _read_pixels(idat: memoryview, width: int, height: int) -> bytes:
    """Check the stored deflate stream and return its pixels without filter bytes."""
    data_at = _IDAT_AT + 8
    if idat[:2] != _ZLIB_HEADER:
        raise FormatError(f"the pixels are compressed; {_EDITOR_HINT}", data_at)
    raw_bytes = height * (1 + 3 * width)
    at, parts = 2, []
    for start, header in _block_headers(raw_bytes):
        if idat[at : at + len(header)] != header:
            raise FormatError(f"not the expected stored block; {_EDITOR_HINT}", data_at + at)
        at += len(header)
        length = min(_BLOCK_BYTES, raw_bytes - start)
        parts.append(idat[at : at + length])
        at += length
    raw = b"".join(parts)
    if _LENGTH.pack(zlib.adler32(raw)) != idat[at:]:
        raise FormatError("Adler-32 of the pixels is wrong: the file is damaged", data_at + at)
    rows = np.frombuffer(raw, np.uint8).reshape(height, 1 + 3 * width)
    if rows[:, 0].any():
        row = int(np.flatnonzero(rows[:, 0])[0])
        raise FormatError(f"row {row} is filtered; {_EDITOR_HINT}", data_at)
    return rows[:, 1:].tobytes()
