"""The rows of a keyring as the program sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from modeling.encryption.errors import KeyringCorrupt


@dataclass(frozen=True)
class HeadRow:
    """The one row about the keyring itself."""

    format: int
    keyring_id: bytes
    kdf: str
    kdf_params: str
    kdf_salt: bytes
    root_wrap: bytes
    epoch: int
    rows_mac: bytes


@dataclass(frozen=True)
class KeyRow:
    """One key, or what is left of it."""

    key_id: bytes
    subject_tag: bytes
    label_ct: bytes | None
    generation: int
    state: str
    imported: int
    wrapped: bytes | None
    created_day: int

    def to_bytes(self) -> bytes:
        """Return an encoding in which two different rows never look alike."""
        parts = []
        for value in astuple(self):
            encoded = b"" if value is None else value if isinstance(value, bytes) else b"%a" % value
            tag = b"-" if value is None else b"+"
            parts.append(tag + len(encoded).to_bytes(4, "big") + encoded)
        return b"".join(parts)


def typed(record: type[Any], values: Sequence[Any], path: Path) -> Any:
    """Return a record after checking the type of every column: SQLite itself does not."""
    kinds = {"int": (int,), "str": (str,), "bytes": (bytes,), "bytes | None": (bytes, type(None))}
    wanted = fields(record)
    if len(values) != len(wanted) or not all(
        isinstance(value, kinds[str(field.type)])
        for value, field in zip(values, wanted, strict=True)
    ):
        raise KeyringCorrupt(f"a row of keyring {path} has the wrong form; restore a backup")
    return record(*values)
