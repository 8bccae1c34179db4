"""Keys that a `protect` run sends to its worker processes, and the choice of a file's key.

A file's locator identifies its key. An imported key is found by trial: the exporter keeps the
locator key, with which the receiver could sort all files by person. So the file's commitment is
derived from each imported key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modeling.encryption.ised_errors import (
    DestroyedKey,
    IsedError,
    MissingKey,
    RevokedKey,
    WrongKey,
)
from modeling.encryption.keys import SubjectKey
from modeling.encryption.primitives import existing_message_key
from modeling.encryption.sealed_image import CONTEXT, key_id_of, public_fields


@dataclass(frozen=True, repr=False)
class KeySnapshot:
    """Keys of a keyring at one moment; a `KeySource` that can be pickled.

    Attributes:
        locator_key: Unmasks locators.
        held: State and key (None if revoked or destroyed) by key id.
        imported: State and key of imported keys.
        sealing: Active key of each requested subject, or the error why it has none.
    """

    locator_key: bytes
    held: Mapping[bytes, tuple[str, bytes | None]]
    imported: tuple[tuple[str, bytes], ...] = ()
    sealing: Mapping[str, SubjectKey | IsedError] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Keep secrets out of logs and tracebacks."""
        return f"KeySnapshot({len(self.held)} keys)"

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the active key of a subject of the snapshot.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: It has none.
        """
        key = self.sealing.get(subject)
        if isinstance(key, SubjectKey):
            return key
        raise key or MissingKey(f"the snapshot of the keyring has no key of subject {subject!r}")

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that a header's locator identifies, or an imported key that fits.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: There is no usable key.
        """
        state, key = self.held.get(key_id_of(header, self.locator_key), ("", None))
        if not state:
            imports = (entry for entry in self.imported if fits(entry[1], header))
            state, key = next(imports, ("", None))
        check_usable(state)
        if key is None:
            raise missing_key()
        return key


def fits(key: bytes, header: bytes) -> bool:
    """Return whether a file was sealed under a key, according to its commitment."""
    salt, _, commit = public_fields(header)
    try:
        existing_message_key(key, CONTEXT, salt, commit)
    except WrongKey:
        return False
    return True


def check_usable(state: str) -> None:
    """Raise if a key in this state must not open files.

    Raises:
        RevokedKey, DestroyedKey: The key is revoked or destroyed.
    """
    if state == "destroyed":
        raise DestroyedKey(
            "the key of this file was destroyed, its content is gone for good; delete the file, "
            "then run `protect.py verify --accept` on the folder"
        )
    if state == "revoked":
        raise RevokedKey(
            "the key of this file was revoked; `keyring revoke --undo` allows it again"
        )


def missing_key() -> MissingKey:
    """Return the error for a file whose key is not in the keyring."""
    return MissingKey(
        "no key for this file: it was sealed under another keyring, its key row is lost, or its "
        "salt or locator is damaged"
    )
