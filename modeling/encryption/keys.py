"""Where keys come from. Free of torch, like all that files need: worker processes start at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class SubjectKey:
    """A key to seal with; ``repr`` shows no secret.

    Attributes:
        key_id: Name of the key, kept secret from outsiders by the locator.
        key: The secret.
        locator_key: Secret that masks key_id in headers; empty where a scheme masks nothing.
    """

    key_id: bytes
    key: bytes
    locator_key: bytes = b""

    def __repr__(self) -> str:
        """Keep secrets out of logs and tracebacks."""
        return "SubjectKey(...)"


@runtime_checkable
class KeySource(Protocol):
    """Where keys come from: a keyring on disk, or keys made for one evaluation."""

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the active key of a subject label, making one if there is none."""
        ...

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that belongs to a public header.

        Raises:
            MissingKey, RevokedKey, DestroyedKey: There is none to be used.
        """
        ...


class EvaluationKeys(KeySource, Protocol):
    """Keys of an evaluation, which also plays the holder of a wrong one."""

    def another_key(self, header: bytes) -> bytes:
        """Return the key of an identity other than the header's."""
        ...


@dataclass(frozen=True)
class WrongKeys:
    """A key source that always hands out another identity's key."""

    right: EvaluationKeys

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the right key: only opening goes wrong."""
        return self.right.sealing_key(subject)

    def opening_key(self, header: bytes) -> bytes:
        """Return the key of another identity."""
        return self.right.another_key(header)
