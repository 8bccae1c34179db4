"""SEAL and OPEN, the one authenticated encryption that everything here is built from.

HKDF-SHA256 turns (key, fresh random salt, context) into a message key and a commitment; AES-256-GCM
encrypts exactly one message under the message key, so the constant nonce is never used twice. GCM
alone does not commit to its key: the commitment does, and it tells a wrong key from damaged data.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from modeling.encryption.ised_errors import Tampered, WrongKey

KEY_BYTES = 32
SALT_BYTES = 32
COMMIT_BYTES = 32
TAG_BYTES = 16
OVERHEAD_BYTES = SALT_BYTES + COMMIT_BYTES + TAG_BYTES

_INFO = b"securereid/ised/v1/"
_NONCE = bytes(12)
_SHA256 = SHA256()

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Box:
    """One sealed message; ``salt || commit || ciphertext || tag`` on disk.

    Attributes:
        salt: 32 random bytes, public.
        commit: 32 bytes that fix the key.
        body: Ciphertext, as long as the message.
        tag: 16 bytes of authentication.
    """

    salt: bytes
    commit: bytes
    body: bytes
    tag: bytes

    @classmethod
    def from_bytes(cls, stored: bytes) -> Box:
        """Cut a stored form apart.

        Raises:
            Tampered: It is too short to be one.
        """
        if len(stored) < OVERHEAD_BYTES:
            raise Tampered(
                f"a sealed record has {len(stored)} bytes; expected {OVERHEAD_BYTES} or more"
            )
        return cls(
            salt=stored[:SALT_BYTES],
            commit=stored[SALT_BYTES : SALT_BYTES + COMMIT_BYTES],
            body=stored[SALT_BYTES + COMMIT_BYTES : -TAG_BYTES],
            tag=stored[-TAG_BYTES:],
        )


@dataclass(frozen=True)
class MessageKey:
    """Key and commitment of one message, before the message is known.

    Split from `seal` because the file format authenticates salt and commitment as part of its
    header, so they have to exist before the header does.
    """

    salt: bytes
    commit: bytes
    _encryption_key: bytes = field(repr=False)  # never in a log or a traceback

    def encrypt(self, aad: bytes, message: Buffer) -> bytes:
        """Return ciphertext || tag. Call it once: the nonce is constant."""
        return AESGCM(self._encryption_key).encrypt(_NONCE, message, aad)

    def decrypt(self, aad: bytes, ciphertext_and_tag: Buffer) -> bytes:
        """Return the message.

        Raises:
            Tampered: Ciphertext, tag or aad is not what was sealed.
        """
        try:
            return AESGCM(self._encryption_key).decrypt(_NONCE, ciphertext_and_tag, aad)
        except InvalidTag:
            raise Tampered("the data was changed after it was sealed") from None


def random_key() -> bytes:
    """Return 32 uniform bytes from the operating system."""
    return os.urandom(KEY_BYTES)


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """Return the 32-byte HMAC-SHA256 of a message."""
    return hmac.digest(key, message, sha256)


def derive_key(key: bytes, context: str) -> bytes:
    """Return a 32-byte sub-key of a uniform key, e.g. one that authenticates a table."""
    info = _INFO + context.encode()
    return HKDF(algorithm=_SHA256, length=KEY_BYTES, salt=None, info=info).derive(key)


def fresh_message_key(key: bytes, context: str) -> MessageKey:
    """Return a key for one new message; the salt always comes from the operating system."""
    return _message_key(key, context, os.urandom(SALT_BYTES))


def existing_message_key(key: bytes, context: str, salt: bytes, commit: bytes) -> MessageKey:
    """Return the key of a sealed message.

    Raises:
        WrongKey: The commitment says that another key sealed it.
    """
    derived = _message_key(key, context, salt)
    if not hmac.compare_digest(derived.commit, commit):
        raise WrongKey("the key is not the one this was sealed under, or its commitment is damaged")
    return derived


def seal(key: bytes, context: str, aad: bytes, message: bytes) -> bytes:
    """Encrypt and authenticate a message.

    Args:
        key: 32 uniform bytes.
        context: What the message is, so that a record of one kind never passes as another.
        aad: Public bytes that have to be the same at opening.
        message: What to keep secret.

    Returns:
        salt || commit || ciphertext || tag, 80 bytes longer than the message.
    """
    message_key = fresh_message_key(key, context)
    return message_key.salt + message_key.commit + message_key.encrypt(aad, message)


def open_sealed(key: bytes, context: str, aad: bytes, stored: bytes) -> bytes:
    """Return the message of `seal`.

    Raises:
        WrongKey: It was sealed under another key.
        Tampered: It, or aad, was changed.
    """
    box = Box.from_bytes(stored)
    message_key = existing_message_key(key, context, box.salt, box.commit)
    return message_key.decrypt(aad, box.body + box.tag)


def _message_key(key: bytes, context: str, salt: bytes) -> MessageKey:
    """Derive key and commitment; known-answer tests give the salt, nothing else does."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {len(key)} bytes; expected {KEY_BYTES}")
    info = _INFO + context.encode()
    okm = HKDF(algorithm=_SHA256, length=2 * KEY_BYTES, salt=salt, info=info).derive(key)
    return MessageKey(salt=salt, commit=okm[KEY_BYTES:], _encryption_key=okm[:KEY_BYTES])
