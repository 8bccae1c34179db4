"""The 256 encrypted bytes that travel with a picture: original size, source hash, relative path."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import PurePosixPath

from modeling.encryption.errors import PathTooLong, Tampered, UnsafePath

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
