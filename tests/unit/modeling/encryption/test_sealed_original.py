"""The format of sealed source files: known answer, damage, padding and binding to a name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from modeling.encryption import sealed_original
from modeling.encryption.ised_errors import FormatError, Tampered, TooLarge, WrongKey
from modeling.encryption.primitives import SubjectKey
from modeling.encryption.sealed_image import Metadata, key_id_of, new_file_key, public_header
from modeling.encryption.sealed_original import (
    file_bytes,
    open_original,
    padded_length,
    read_public,
    seal_original,
)
from tests.fixtures.paths import GOLDEN

KEY = SubjectKey(bytes(range(16)), bytes(range(32)), bytes(range(32, 64)))
STEM = "dprkokvtb7tqvrd73xnjl5lkou"


def _metadata(content: bytes) -> Metadata:
    return Metadata("0001/a.jpg", hashlib.sha256(content).digest(), 48, 24)


def _sealed(content: bytes) -> bytes:
    return seal_original(new_file_key(KEY), content, _metadata(content), STEM)


def test_the_known_answer_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    known = json.loads((GOLDEN / "original_v1.json").read_text("utf-8"))
    content, stored = bytes.fromhex(known["content"]), bytes.fromhex(known["file"])
    secret = {name: bytes.fromhex(known[name]) for name in ("key_id", "key", "locator_key", "salt")}
    key = SubjectKey(secret["key_id"], secret["key"], secret["locator_key"])
    opened = open_original(key.key, stored, known["stem"])
    assert opened.content == content
    assert opened.metadata.path == known["path"]
    assert [opened.metadata.orig_w, opened.metadata.orig_h] == known["original_size"]
    assert key_id_of(read_public(stored), key.locator_key) == key.key_id
    monkeypatch.setattr("modeling.encryption.primitives.os.urandom", lambda count: secret["salt"])
    assert seal_original(new_file_key(key), content, opened.metadata, known["stem"]) == stored


@pytest.mark.parametrize("length", [1, 2, 255, 256, 4097, 100_000])
def test_the_content_returns_bit_for_bit(length: int) -> None:
    content = bytes(range(256)) * (length // 256) + bytes(range(length % 256))
    stored = _sealed(content)
    assert len(stored) == file_bytes(length)
    opened = open_original(KEY.key, stored, STEM)
    assert opened.content == content
    assert opened.metadata == _metadata(content)


def test_every_changed_byte_is_refused() -> None:
    stored = _sealed(b"a small file")
    for at in range(len(stored)):
        changed = bytearray(stored)
        changed[at] ^= 1 << at % 8
        with pytest.raises((FormatError, WrongKey, Tampered)):
            open_original(KEY.key, bytes(changed), STEM)


@pytest.mark.parametrize("kept", [0, 7, 88, 300, -1])
def test_a_truncated_or_extended_file_is_refused(kept: int) -> None:
    stored = _sealed(b"a small file")
    with pytest.raises((FormatError, Tampered)):
        open_original(KEY.key, stored[:kept], STEM)
    with pytest.raises(Tampered):
        open_original(KEY.key, stored + stored[: kept or 1], STEM)


def test_another_name_or_key_is_refused() -> None:
    stored = _sealed(b"content")
    with pytest.raises(Tampered):
        open_original(KEY.key, stored, STEM[::-1])
    with pytest.raises(WrongKey):
        open_original(bytes(32), stored, STEM)


def test_a_file_of_another_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder of the key writes another hash, or another padding."""
    wrong = replace(_metadata(b"content"), source_sha256=bytes(32))
    with pytest.raises(Tampered, match="do not match"):
        open_original(KEY.key, seal_original(new_file_key(KEY), b"content", wrong, STEM), STEM)
    with monkeypatch.context() as patch:
        patch.setattr(sealed_original, "padded_length", lambda length: length + 1)
        stored = _sealed(b"content")
    with pytest.raises(Tampered, match="padding"):
        open_original(KEY.key, stored, STEM)


def test_a_sealed_image_is_not_an_original() -> None:
    with pytest.raises(FormatError, match="kind 1; expected 2"):
        read_public(public_header(new_file_key(KEY), 1) + bytes(500))


def test_padding_is_at_most_12_percent_and_leaves_few_lengths() -> None:
    for length in [*range(1, 5000), *range(2**20, 2**21, 997), 2**28 - 1, 2**28]:
        assert length <= padded_length(length) <= max(length * 1.12, length + 1)
    assert len({padded_length(length) for length in range(2**12 + 1, 2**13 + 1)}) == 16
    assert len({padded_length(length) for length in range(2**20 + 1, 2**21 + 1, 64)}) == 32


def test_a_source_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_original, "MAX_CONTENT_BYTES", 6)
    with pytest.raises(TooLarge, match="7 bytes; at most 6"):
        _sealed(b"content")
