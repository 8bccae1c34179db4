"""One sealed source file: public header, and encrypted metadata and bytes (docs/FORMAT.md).

::

    offset len
         0  88  "ISED", version 1, kind 2, zero, salt, locator, commit: see `sealed_image`
        88   n  encrypted: metadata (256), length of the source file (8), its bytes, zeros
    88 + n  16  tag

The tag also authenticates the name of the file, without its suffix, which is that of the sealed
image. An original under the name of another image is therefore refused. The zeros hide the exact
length of the source file, which could identify it.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from modeling.encryption.ised_errors import FormatError, Tampered, TooLarge
from modeling.encryption.primitives import TAG_BYTES, existing_message_key
from modeling.encryption.sealed_image import (
    CONTEXT,
    METADATA_BYTES,
    PUBLIC_BYTES,
    FileKey,
    Metadata,
    check_public,
    public_fields,
    public_header,
)

KIND = 2
ORIGINAL_SUFFIX = ".original"
MAX_CONTENT_BYTES = 1 << 28
_AAD = b"securereid/ised/original"
_LENGTH = struct.Struct(">Q")
_CONTENT_AT = METADATA_BYTES + _LENGTH.size
_OVERHEAD_BYTES = PUBLIC_BYTES + _CONTENT_AT + TAG_BYTES


@dataclass(frozen=True)
class Original:
    """A source file after authentication and decryption."""

    content: memoryview  # its bytes
    metadata: Metadata  # the same metadata as in the sealed image


def padded_length(length: int) -> int:
    """Return a length rounded up to one of few values, at most 12 % longer (Padmé).

    Between 256 bytes and 64 KiB there are 16 values per doubling, up to 4 GiB there are 32.
    Source: Nikitin et al., "Reducing metadata leakage from encrypted files and communication with
    PURBs", PETS 2019, algorithm 1.
    """
    exponent = length.bit_length() - 1
    step = 1 << max(0, exponent - exponent.bit_length())
    return -(-length // step) * step


def file_bytes(length: int) -> int:
    """Return the length of the sealed file of a source file of some length, both in bytes."""
    return _OVERHEAD_BYTES + padded_length(length)


def seal_original(key: FileKey, content: bytes, metadata: Metadata, stem: str) -> bytes:
    """Return the sealed file of a source file.

    Call it once per key: a second message under one key would reveal both.

    The key is made from the subject's key for originals, the metadata are those of the sealed
    image, and the stem is its name without the suffix.

    Raises:
        TooLarge: The source file has more than MAX_CONTENT_BYTES bytes.
    """
    if len(content) > MAX_CONTENT_BYTES:
        raise TooLarge(f"source file of {len(content)} bytes; at most {MAX_CONTENT_BYTES}")
    public = public_header(key, KIND)
    zeros = bytes(padded_length(len(content)) - len(content))
    message = b"".join((metadata.to_bytes(), _LENGTH.pack(len(content)), content, zeros))
    ciphertext = key.message_key.encrypt(_aad(public, stem), message)
    del message  # otherwise four times the source file would be in memory
    return public + ciphertext


def open_original(key: bytes, stored: bytes, stem: str) -> Original:
    """Authenticate and decrypt a sealed source file; the stem is its name without the suffix.

    Raises:
        FormatError, UnsupportedVersion: See `read_public`.
        WrongKey: It was sealed under another key.
        Tampered: It was changed, or has another name than it was sealed for.
    """
    public = read_public(stored)
    salt, _, commit = public_fields(public)
    message_key = existing_message_key(key, CONTEXT, salt, commit)
    message = message_key.decrypt(_aad(public, stem), memoryview(stored)[PUBLIC_BYTES:])
    (length,) = _LENGTH.unpack_from(message, METADATA_BYTES)
    content = memoryview(message)[_CONTENT_AT : _CONTENT_AT + length]
    metadata = Metadata.from_bytes(message[:METADATA_BYTES])
    zeros = message[_CONTENT_AT + length :]
    if len(stored) != file_bytes(length) or zeros != bytes(len(zeros)):
        raise Tampered("the padding is not that of this program: another program sealed the file")
    if hashlib.sha256(content).digest() != metadata.source_sha256:
        raise Tampered("content and metadata do not match: another program sealed the file")
    return Original(content, metadata)


def read_public(stored: bytes) -> bytes:
    """Return the public header in a sealed source file or its beginning, or raise FormatError."""
    if len(stored) < _OVERHEAD_BYTES:
        raise FormatError(f"truncated: {len(stored)} bytes; expected more", len(stored))
    check_public(stored, KIND, 0)
    return stored[:PUBLIC_BYTES]


def _aad(public: bytes, stem: str) -> bytes:
    """Return the bytes that are authenticated but not encrypted."""
    return _AAD + public + stem.encode()
