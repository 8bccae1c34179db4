"""The rows of a keyring: their encoding, an index in memory, and their authentication.

The head of a keyring authenticates the set of its rows (docs/FORMAT.md). Formats 2 and 3 seal the
sum, modulo 2^256, of a keyed hash of each row: writing a row updates the sum in constant time. The
sum must be secret. From two sums in clear, anyone could compute the difference that restores an
older row. Format 1 has one HMAC over all rows.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from modeling.encryption.ised_errors import AuthenticationError, DestroyedKey, RevokedKey
from modeling.encryption.primitives import derive_key, hmac_sha256, open_sealed, seal

FORMAT = 3
OLD_FORMATS = (1, 2)
SERVICES = ("audit", "label", "locate", "name", "sign")
OLD_SERVICES = ("label", "locate", "name")
IMAGE = "image"  # purpose of a key that seals anonymized images
ORIGINAL = "original"  # purpose of a key that seals source files
PURPOSES = (IMAGE, ORIGINAL)
KDFS = ("file", "argon2id", "command")  # forms of the master

_SUM_BYTES = 32
_SUM_MODULUS = 1 << 8 * _SUM_BYTES
_SUM_CONTEXT = "row sum"
_LENGTH = struct.Struct(">I").pack


@dataclass(frozen=True)
class HeadRow:
    """The single row about the keyring itself."""

    format: int
    keyring_id: bytes
    kdf: str
    kdf_params: str
    kdf_data: bytes  # salt of Argon2id, or the wrapped master key of a wrap command; else empty
    root_wrap: bytes
    epoch: int
    rows_mac: bytes
    # entries in the audit log, and hash of the last one
    audit_count: int = 0
    audit_hash: bytes = bytes(32)


@dataclass(frozen=True)
class KeyRow:
    """One key, or the tombstone of a destroyed key."""

    key_id: bytes
    subject_tag: bytes
    label_ct: bytes | None
    generation: int
    state: str
    imported: int
    wrapped: bytes | None
    created_day: int
    purpose: str
    used_day: int  # last day on which the key was used to seal; its creation counts too

    def to_bytes(self, number: int = FORMAT) -> bytes:
        """Return an unambiguous encoding for a format: different rows have different encodings."""
        values = [self.key_id, self.subject_tag, self.label_ct, b"%d" % self.generation]
        values += [b"'%b'" % self.state.encode(), b"%d" % self.imported, self.wrapped]
        values.append(b"%d" % self.created_day)
        if number == FORMAT:
            values += [self.purpose.encode(), b"%d" % self.used_day]
        return b"".join(
            b"-\0\0\0\0" if value is None else b"+" + _LENGTH(len(value)) + value
            for value in values
        )

    def check_usable(self) -> None:
        """Raise RevokedKey or DestroyedKey if the key must not open files."""
        if self.state == "destroyed":
            raise DestroyedKey(
                "the key of this file was destroyed, its content is gone for good; delete the "
                "file, then run `protect.py verify --accept` on the folder"
            )
        if self.state == "revoked":
            raise RevokedKey(
                "the key of this file was revoked; `keyring revoke --undo` allows it again"
            )


class RowSet:
    """Key rows in memory, indexed, with the sum of their keyed hashes."""

    def __init__(self, root: bytes, rows: Iterable[KeyRow] = (), number: int = FORMAT) -> None:
        """Index rows of a keyring format; the root key authenticates them."""
        self._number = number
        self._hash_key = derive_key(root, "row hash")
        self._sum = 0
        self.by_id: dict[bytes, KeyRow] = {}
        self.by_tag: dict[bytes, dict[bytes, KeyRow]] = {}  # by subject tag and key id
        self.active: dict[tuple[bytes, str], KeyRow] = {}  # by subject tag and purpose
        self.imported: dict[bytes, KeyRow] = {}  # by key id
        for row in rows:
            self._add(row)

    def put(self, row: KeyRow) -> None:
        """Add a row, in place of the row with its key id."""
        old = self.by_id.get(row.key_id)
        if old is not None:
            del self.by_tag[old.subject_tag][row.key_id]
            if old.state == "active":
                del self.active[old.subject_tag, old.purpose]
            self.imported.pop(row.key_id, None)
            self._sum = (self._sum - self._hash(old)) % _SUM_MODULUS
        self._add(row)

    def sealed_sum(
        self, root: bytes, head: HeadRow, services: Mapping[str, bytes], *, normalized: bool
    ) -> bytes:
        """Return the record that authenticates rows, head and services in formats 2 and 3.

        It also contains whether every label is in the form that new labels get.
        """
        record = self._sum.to_bytes(_SUM_BYTES, "big") + bytes([normalized])
        return seal(root, _SUM_CONTEXT, _sum_aad(head, services), record)

    def authenticate(self, root: bytes, head: HeadRow, services: Mapping[str, bytes]) -> bool:
        """Check these rows and the service keys against the head of their keyring.

        Return whether every label is known to be in the form that new labels get.

        Raises:
            AuthenticationError: A row or service key was edited, added, removed or put back.
        """
        if head.format == 1:
            if hmac.compare_digest(self.format_1_code(root, head, services), head.rows_mac):
                return False
            raise AuthenticationError("the rows do not match their authentication code")
        record = open_sealed(root, _SUM_CONTEXT, _sum_aad(head, services), head.rows_mac)
        if not hmac.compare_digest(record[:_SUM_BYTES], self._sum.to_bytes(_SUM_BYTES, "big")):
            raise AuthenticationError("the rows do not match their sum")
        return record[_SUM_BYTES:] == b"\1"

    def are_current(self, root: bytes, head: HeadRow, services: Mapping[str, bytes]) -> bool:
        """Return whether these are still the rows of a keyring; a new audit entry changes none."""
        try:
            self.authenticate(root, head, services)
        except AuthenticationError:
            return False
        return head.format == self._number

    def format_1_code(self, root: bytes, head: HeadRow, services: Mapping[str, bytes]) -> bytes:
        """Return the HMAC over all rows, in order of their key ids, of format 1."""
        code = hmac.new(derive_key(root, "rows"), head.epoch.to_bytes(8, "big"), "sha256")
        code.update(_services_bytes(services))
        for key_id in sorted(self.by_id):
            code.update(self.by_id[key_id].to_bytes(1))
        return code.digest()

    def _add(self, row: KeyRow) -> None:
        self.by_id[row.key_id] = row
        self.by_tag.setdefault(row.subject_tag, {})[row.key_id] = row
        if row.state == "active":
            self.active[row.subject_tag, row.purpose] = row
        if row.imported:
            self.imported[row.key_id] = row
        self._sum = (self._sum + self._hash(row)) % _SUM_MODULUS

    def _hash(self, row: KeyRow) -> int:
        return int.from_bytes(hmac_sha256(self._hash_key, row.to_bytes(self._number)), "big")


def _sum_aad(head: HeadRow, services: Mapping[str, bytes]) -> bytes:
    aad = head.format.to_bytes(4, "big") + head.epoch.to_bytes(8, "big") + head.keyring_id
    if head.format == FORMAT:
        aad += head.audit_count.to_bytes(8, "big") + head.audit_hash
    return aad + _services_bytes(services)


def _services_bytes(services: Mapping[str, bytes]) -> bytes:
    return b"".join(
        name.encode() + len(wrapped).to_bytes(4, "big") + wrapped
        for name, wrapped in sorted(services.items())
    )
