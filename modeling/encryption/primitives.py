"""Keys of subjects, and SEAL and OPEN: the authenticated encryption of files and keyrings.

HKDF-SHA256 turns (key, fresh random salt, context) into a message key and a commitment. AES-256-GCM
encrypts exactly one message under the message key, so the constant nonce is never used twice. GCM
does not commit to its key. The commitment does, and it separates a wrong key from damaged data.

Free of torch: worker processes start fast.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol, runtime_checkable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from modeling.encryption.ised_errors import Tampered, WrongKey

KEY_BYTES = 32
SALT_BYTES = 32
COMMIT_BYTES = 32
TAG_BYTES = 16
_HEAD_BYTES = SALT_BYTES + COMMIT_BYTES
OVERHEAD_BYTES = _HEAD_BYTES + TAG_BYTES

_INFO = b"securereid/ised/v1/"
_NONCE = bytes(12)
_SHA256 = SHA256()

Buffer = bytes | bytearray | memoryview
KeyOf = Callable[[bytes], bytes]  # returns the key that a public header identifies


@dataclass(frozen=True)
class MessageKey:
    """Encryption key and commitment of one message.

    Separate from `seal`, because the file format authenticates salt and commitment as part of its
    header. They must exist before the header.
    """

    salt: bytes
    commit: bytes
    _encryption_key: bytes = field(repr=False)  # never in a log or a traceback

    def encrypt(self, aad: bytes, message: Buffer) -> bytes:
        """Return ciphertext || tag. Call this only once: the nonce is constant."""
        return AESGCM(self._encryption_key).encrypt(_NONCE, message, aad)

    def decrypt(self, aad: bytes, ciphertext_and_tag: Buffer) -> bytes:
        """Return the message; raise Tampered if ciphertext, tag or aad was changed."""
        try:
            return AESGCM(self._encryption_key).decrypt(_NONCE, ciphertext_and_tag, aad)
        except InvalidTag:
            raise Tampered("the data was changed after it was sealed") from None


def random_key() -> bytes:
    """Return 32 random bytes from the operating system."""
    return os.urandom(KEY_BYTES)


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """Return the 32-byte HMAC-SHA256 of a message."""
    return hmac.digest(key, message, sha256)


def derive_key(key: bytes, context: str) -> bytes:
    """Return the 32-byte subkey of a key for a context."""
    info = _INFO + context.encode()
    return HKDF(algorithm=_SHA256, length=KEY_BYTES, salt=None, info=info).derive(key)


def fresh_message_key(key: bytes, context: str) -> MessageKey:
    """Return the key of one new message, with a random salt from the operating system."""
    return _message_key(key, context, os.urandom(SALT_BYTES))


def existing_message_key(key: bytes, context: str, salt: bytes, commit: bytes) -> MessageKey:
    """Return the key of a sealed message; raise WrongKey if it was sealed under another key."""
    derived = _message_key(key, context, salt)
    if not hmac.compare_digest(derived.commit, commit):
        raise WrongKey("it was sealed under another key, or its commitment is damaged")
    return derived


def seal(key: bytes, context: str, aad: bytes, message: bytes) -> bytes:
    """Encrypt and authenticate a message under 32 uniform bytes.

    A record for one context (purpose) does not open as another. The aad are public bytes, which
    must be the same at opening.

    Returns:
        salt || commit || ciphertext || tag, 80 bytes longer than the message.
    """
    message_key = fresh_message_key(key, context)
    return message_key.salt + message_key.commit + message_key.encrypt(aad, message)


def open_sealed(key: bytes, context: str, aad: bytes, stored: bytes) -> bytes:
    """Return the message that `seal` encrypted.

    Raises:
        WrongKey: It was sealed under another key.
        Tampered: It was changed or truncated, or aad is another.
    """
    if len(stored) < OVERHEAD_BYTES:
        raise Tampered(
            f"a sealed record has {len(stored)} bytes; expected {OVERHEAD_BYTES} or more"
        )
    salt, commit = stored[:SALT_BYTES], stored[SALT_BYTES:_HEAD_BYTES]
    return existing_message_key(key, context, salt, commit).decrypt(aad, stored[_HEAD_BYTES:])


def _message_key(key: bytes, context: str, salt: bytes) -> MessageKey:
    """Derive key and commitment. Only known-answer tests choose the salt."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {len(key)} bytes; expected {KEY_BYTES}")
    info = _INFO + context.encode()
    okm = HKDF(algorithm=_SHA256, length=2 * KEY_BYTES, salt=salt, info=info).derive(key)
    return MessageKey(salt=salt, commit=okm[KEY_BYTES:], _encryption_key=okm[:KEY_BYTES])


@dataclass(frozen=True)
class SubjectKey:
    """A key to seal with; ``repr`` does not contain it."""

    key_id: bytes  # id of the key; the locator hides it from outsiders
    key: bytes  # the secret
    # secret that masks key_id in headers; empty if the scheme masks nothing
    locator_key: bytes = b""

    def __repr__(self) -> str:
        """Keep secrets out of logs and tracebacks."""
        return "SubjectKey(...)"


@runtime_checkable
class EvaluationKeys(Protocol):
    """The keys of an evaluation, which also tries wrong keys."""

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the active key of a subject label; create it if it does not exist."""
        ...

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that a public header identifies, or raise MissingKey."""
        ...

    def another_key(self, header: bytes) -> bytes:
        """Return the key of an identity other than the header's."""
        ...
