"""Published test vectors with the installed library, and SEAL/OPEN based on it."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from modeling.encryption.ised_errors import AuthenticationError, Tampered, WrongKey
from modeling.encryption.primitives import OVERHEAD_BYTES, open_sealed, seal
from tests.fixtures.paths import GOLDEN


def _tests(name: str) -> list[dict[str, Any]]:
    tests: list[dict[str, Any]] = json.loads((GOLDEN / name).read_text())["tests"]
    return tests


def _bytes(test: dict[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(test[name]) for name in names]


def test_wycheproof_aes_256_gcm() -> None:
    tests = _tests("wycheproof_aes_256_gcm.json")
    assert {test["result"] for test in tests} == {"valid", "invalid"}
    for test in tests:
        key, nonce, aad, message, ct, tag = _bytes(test, "key", "iv", "aad", "msg", "ct", "tag")
        if test["result"] == "valid":
            assert AESGCM(key).encrypt(nonce, message, aad) == ct + tag
            assert AESGCM(key).decrypt(nonce, ct + tag, aad) == message
        else:
            with pytest.raises(InvalidTag):
                AESGCM(key).decrypt(nonce, ct + tag, aad)


@pytest.mark.parametrize("name", ["wycheproof_hkdf_sha256.json", "rfc5869_hkdf_sha256.json"])
def test_hkdf_sha256(name: str) -> None:
    for test in _tests(name):
        ikm, salt, info, okm = _bytes(test, "ikm", "salt", "info", "okm")
        if test.get("result", "valid") == "valid":
            assert HKDF(SHA256(), test["size"], salt, info).derive(ikm) == okm
        else:
            with pytest.raises(ValueError, match="(?i)length|size|large"):
                HKDF(SHA256(), test["size"], salt, info).derive(ikm)


def test_argon2id() -> None:
    for test in _tests("rfc9106_argon2id.json"):
        password, salt, secret, ad, tag = _bytes(test, "password", "salt", "secret", "ad", "tag")
        derived = Argon2id(
            salt=salt,
            length=test["length"],
            iterations=test["iterations"],
            lanes=test["lanes"],
            memory_cost=test["memory_kib"],
            ad=ad or None,
            secret=secret or None,
        ).derive(password)
        assert derived == tag


@given(message=st.binary(max_size=200), aad=st.binary(max_size=40), place=st.integers(0, 10**6))
def test_sealed_data_opens_unchanged_or_not_at_all(message: bytes, aad: bytes, place: int) -> None:
    key = bytes(range(32))
    stored = seal(key, "test", aad, message)
    assert len(stored) == len(message) + OVERHEAD_BYTES
    assert open_sealed(key, "test", aad, stored) == message
    damaged = bytearray(stored)
    damaged[place // 8 % len(stored)] ^= 1 << place % 8
    with pytest.raises(AuthenticationError):
        open_sealed(key, "test", aad, bytes(damaged))
    with pytest.raises(Tampered):
        open_sealed(key, "test", aad + b"x", stored)
    with pytest.raises(AuthenticationError):
        open_sealed(key, "test", aad, stored[: place % len(stored)])


def test_keys_contexts_and_salts_separate_records() -> None:
    key = os.urandom(32)
    stored = seal(key, "label", b"", b"anna")
    with pytest.raises(WrongKey):
        open_sealed(os.urandom(32), "label", b"", stored)
    with pytest.raises(WrongKey):
        open_sealed(key, "key", b"", stored)
    assert seal(key, "label", b"", b"anna") != stored
    with pytest.raises(ValueError, match="31 bytes; expected 32"):
        seal(key[:31], "label", b"", b"anna")
