"""Shares of a master key file: any `needed` of them give the key, fewer do not.

Shamir's secret sharing over GF(256), byte by byte, with the polynomial of AES, as in SLIP-0039. Its
reference library is not used: its authors advise against it for secrets that matter. docs/FORMAT.md
describes the files.

Fewer values are independent of the key. But each share contains a commitment to the key, by which a
guess can be tested. So the key, which is random, is hidden computationally, not unconditionally.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.vault.secret_files import read_private, write_new_private
from modeling.encryption.ised_errors import (
    FormatError,
    KeyringExists,
    StorageError,
    Tampered,
    UsageError,
)
from modeling.encryption.primitives import KEY_BYTES, derive_key, hmac_sha256
from utils.files import WriteError, ensure_folder

MAX_SHARES = 32  # GF(256) would allow 255

_SET_BYTES = 16
_TITLE = "SecureReID share of a master key, format 1"
_TEXT = re.compile(
    rf"{_TITLE}\n"
    r"set: ([0-9a-f]{32})\ncommitment: ([0-9a-f]{64})\n"
    r"share: (\d{1,3}) of (\d{1,3})\nneeded: (\d{1,3})\n"
    r"value: ([0-9a-f]{64})\nchecksum: ([0-9a-f]{16})\n"
)
_MAX_TEXT_BYTES = 1024


@dataclass(frozen=True)
class Share:
    """One share of a key."""

    set_id: bytes  # 16 random bytes, the same in all shares of one split
    commitment: bytes  # keyed hash that only the right key reproduces
    number: int  # position of this share, from 1
    count: int  # shares
    needed: int  # shares that give the key
    value: bytes = field(repr=False)  # 32 bytes

    def to_text(self) -> str:
        """Return the content of the file of this share: ASCII lines that can also be printed."""
        text = (
            f"{_TITLE}\nset: {self.set_id.hex()}\ncommitment: {self.commitment.hex()}\n"
            f"share: {self.number} of {self.count}\nneeded: {self.needed}\n"
            f"value: {self.value.hex()}\n"
        )
        return f"{text}checksum: {_checksum(text)}\n"

    @classmethod
    def parse(cls, content: bytes, name: str) -> Share:
        """Return the share in the content of a file; raise FormatError if it was changed."""
        text = content.decode("ascii", "replace").replace("\r\n", "\n")
        match = _TEXT.fullmatch(text.rstrip() + "\n")
        if match is None:
            raise FormatError(f"{name} is not a share of a master key; expected {_TITLE!r} ...")
        *_, value, checksum = match.groups()
        set_id, commitment = (bytes.fromhex(part) for part in match.group(1, 2))
        number, count, needed = (int(part) for part in match.group(3, 4, 5))
        if checksum != _checksum(match.group()[: match.start(7) - len("checksum: ")]):
            raise FormatError(f"{name}: the checksum is wrong; compare it with the printed share")
        if not 2 <= needed <= count <= MAX_SHARES or not 1 <= number <= count:
            raise FormatError(f"{name}: share {number} of {count}, {needed} needed, is impossible")
        return cls(set_id, commitment, number, count, needed, bytes.fromhex(value))


def split(key: bytes, needed: int, count: int) -> list[Share]:
    """Return `count` shares of a key, of which `needed` give it: 2 <= needed <= count <= 32."""
    if not 2 <= needed <= count <= MAX_SHARES:
        raise UsageError(
            f"{count} shares of which {needed} are needed; expected 2 <= needed <= shares <= "
            f"{MAX_SHARES}"
        )
    set_id = os.urandom(_SET_BYTES)
    commitment = _commitment(key, set_id, needed, count)
    # One polynomial of degree needed - 1 for each byte; the key is its value at 0.
    coefficients = [os.urandom(KEY_BYTES) for _ in range(needed - 1)] + [key]
    shares = []
    for number in range(1, count + 1):
        value = bytes(KEY_BYTES)
        for coefficient in coefficients:  # Horner's rule
            value = _add(_scale(value, number), coefficient)
        shares.append(Share(set_id, commitment, number, count, needed, value))
    return shares


def combine(shares: Sequence[Share]) -> bytes:
    """Return the key of shares of one set.

    Raises:
        UsageError: They are of several sets, too few, or one is given twice.
        Tampered: They are complete but give another key: the value of a share was changed.
    """
    head = shares[0]
    if len({(s.set_id, s.commitment, s.count, s.needed) for s in shares}) > 1:
        sets = ", ".join(sorted({share.set_id.hex()[:8] for share in shares}))
        raise UsageError(f"the shares are of different sets ({sets}); give shares of one set")
    numbers = [share.number for share in shares]
    given = ", ".join(map(str, numbers))
    for number in numbers:
        if numbers.count(number) > 1:
            raise UsageError(f"share {number} is given twice; give {head.needed} different shares")
    if len(shares) < head.needed:
        raise UsageError(
            f"set {head.set_id.hex()[:8]} needs {head.needed} of its {head.count} shares; "
            f"got {len(shares)} (number {given})"
        )
    key = interpolate({share.number: share.value for share in shares}, 0)
    expected = _commitment(key, head.set_id, head.needed, head.count)
    if not hmac.compare_digest(expected, head.commitment):
        raise Tampered(
            f"shares {given} do not give the key of their set: one of them was changed; try others"
        )
    return key


def interpolate(values: dict[int, bytes], at: int) -> bytes:
    """Return the value at a point of the polynomials through points of GF(256), byte by byte."""
    result = bytes(len(next(iter(values.values()))))
    for x, value in values.items():
        factor = 1
        for other in values:
            if other != x:
                factor = _multiply(factor, _multiply(at ^ other, _inverse(x ^ other)))
        result = _add(result, _scale(value, factor))
    return result


def write_shares(shares: Sequence[Share], folder: Path) -> list[Path]:
    """Write each share to a private file of a folder, all or none; return the files.

    Raises:
        KeyringExists: One of the files exists.
        StorageError: They cannot be written.
    """
    try:
        ensure_folder(folder)
    except WriteError as error:
        raise StorageError(str(error)) from None
    texts = {folder / f"share-{s.number}-of-{s.count}.txt": s.to_text() for s in shares}
    for path in filter(os.path.lexists, texts):
        raise _exists(path)
    written: list[Path] = []
    try:
        for path, text in texts.items():
            write_new_private(path, text.encode())
            written.append(path)
    except BaseException as error:
        for done in written:
            done.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise _exists(path) from None
        raise
    return written


def read_key(paths: Sequence[Path]) -> bytes:
    """Return the master key of the files of its shares.

    Raises:
        KeyringMissing, InsecurePermissions: A file does not exist or is not private.
        FormatError, UsageError, Tampered: See `Share.parse` and `combine`.
    """
    contents = [(read_private(path, "share", _MAX_TEXT_BYTES), str(path)) for path in paths]
    return combine([Share.parse(*content) for content in contents])


def _commitment(key: bytes, set_id: bytes, needed: int, count: int) -> bytes:
    """Return a keyed hash of a set, by which a guess of the key can be tested."""
    return hmac_sha256(derive_key(key, "shares"), set_id + bytes([needed, count]))


def _exists(path: Path) -> KeyringExists:
    return KeyringExists(f"{path} exists already; choose an empty folder")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _multiply(a: int, b: int) -> int:
    """Return the product in GF(256), without branches or tables that depend on the factors."""
    product = 0
    for _ in range(8):
        product ^= a & -(b & 1)
        a = (a << 1 & 0xFF) ^ (0x1B & -(a >> 7))
        b >>= 1
    return product


def _inverse(a: int) -> int:
    """Return a to the power 254, which is 1 / a."""
    result = a
    for _ in range(6):
        result = _multiply(_multiply(result, result), a)
    return _multiply(result, result)


def _scale(values: bytes, factor: int) -> bytes:
    return bytes(_multiply(value, factor) for value in values)


def _add(first: bytes, second: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(first, second, strict=True))
