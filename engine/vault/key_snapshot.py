"""From a file's header to its key: by locator, or, for imported keys, by trial.

Whoever exports one person's keys does not hand over the locator key, which would sort everybody's
files by person. So an imported key is found by deriving the file's commitment from it.
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
    """Keys as they were at one moment, a `KeySource` that worker processes can be sent.

    Attributes:
        locator_key: Unmasks locators.
        held: State and key (None once revoked or destroyed) by key id.
        imported: State and key of the keys to be tried.
        sealing: Active key of each subject that was asked for, or why there is none.
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
            MissingKey, RevokedKey, DestroyedKey: There is none.
        """
        found = self.sealing.get(subject)
        if isinstance(found, SubjectKey):
            return found
        raise found or MissingKey(f"no key of subject {subject!r} was taken along")

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that a header's locator names, or an imported one that fits.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: There is none to be used.
        """
        state, key = self.held.get(key_id_of(header, self.locator_key), ("", None))
        if not state:
            state, key = next((held for held in self.imported if fits(held[1], header)), ("", None))
        check_usable(state)
        if key is None:
            raise missing_key()
        return key


def fits(key: bytes, header: bytes) -> bool:
    """Whether a file was sealed under a key, as its commitment says."""
    salt, _, commit = public_fields(header)
    try:
        existing_message_key(key, CONTEXT, salt, commit)
    except WrongKey:
        return False
    return True


def check_usable(state: str) -> None:
    """Refuse keys that must not open anything.

    Raises:
        RevokedKey, DestroyedKey: The state says so.
    """
    if state == "destroyed":
        raise DestroyedKey(
            "the key of this file was destroyed, its content is gone for good; delete the file and "
            "take the folder without it: `protect.py verify --accept`"
        )
    if state == "revoked":
        raise RevokedKey(
            "the key of this file was revoked; `keyring revoke --undo` allows it again"
        )


def missing_key() -> MissingKey:
    """Return the error for a file whose key is not here."""
    return MissingKey(
        "no key for this file: it was sealed under another keyring, its key row is lost, or its "
        "salt or locator is damaged"
    )
