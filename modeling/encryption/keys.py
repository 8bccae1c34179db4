"""Keys of subjects and the interface of key sources. Free of torch: worker processes start fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class SubjectKey:
    """A key to seal with; ``repr`` does not contain it.

    Attributes:
        key_id: Id of the key; the locator hides it from outsiders.
        key: The secret.
        locator_key: Secret that masks key_id in headers; empty if the scheme masks nothing.
    """

    key_id: bytes
    key: bytes
    locator_key: bytes = b""

    def __repr__(self) -> str:
        """Keep secrets out of logs and tracebacks."""
        return "SubjectKey(...)"


@runtime_checkable
class KeySource(Protocol):
    """A source of keys: a keyring on disk, or keys made for one evaluation."""

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the active key of a subject label; create it if it does not exist."""
        ...

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that a public header identifies.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: There is no usable key.
        """
        ...


class EvaluationKeys(KeySource, Protocol):
    """Keys of an evaluation, which also tries wrong keys."""

    def another_key(self, header: bytes) -> bytes:
        """Return the key of an identity other than the header's."""
        ...


@dataclass(frozen=True)
class WrongKeys:
    """A key source that returns another identity's key for opening."""

    right: EvaluationKeys

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the right key."""
        return self.right.sealing_key(subject)

    def opening_key(self, header: bytes) -> bytes:
        """Return the key of another identity."""
        return self.right.another_key(header)
