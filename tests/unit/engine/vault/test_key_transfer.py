"""Export and import of the keys of a subject."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.vault import keyring_admin, secret_files
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import export_subject, import_subject
from engine.vault.master import Argon2Cost, KeyFile, Passphrase
from modeling.encryption.ised_errors import (
    DestroyedKey,
    FormatError,
    KeyringExists,
    MissingKey,
    RevokedKey,
    Tampered,
    UsageError,
)
from modeling.encryption.primitives import seal
from tests.fixtures.keyrings import CHEAP, SUBJECT, opens, seal_pixels


def test_an_export_opens_one_subject_only(tmp_path: Path, keyring: Keyring) -> None:
    first = seal_pixels(keyring)
    keyring_admin.rotate(keyring, SUBJECT)
    second, foreign = seal_pixels(keyring), seal_pixels(keyring, "market/test/3")
    exported, phrase = tmp_path / "two.keys", Passphrase("for the court", CHEAP)
    assert export_subject(keyring, SUBJECT, exported, phrase) == 2
    with pytest.raises(KeyringExists):
        export_subject(keyring, SUBJECT, exported, phrase)
    with Keyring.create(tmp_path / "b.db", KeyFile(tmp_path / "b.key")) as other:
        assert import_subject(other, exported, phrase) == (SUBJECT, 2)
        assert import_subject(other, exported, phrase) == (SUBJECT, 0)
        assert opens(other, first)
        assert opens(other, second)
        with pytest.raises(MissingKey, match="another keyring"):
            other.opening_key(foreign.chunk)
        imported = {row.key_id for row in other.rows}
        assert other.sealing_key(SUBJECT).key_id not in imported  # never seals under them
        keyring_admin.revoke(other, SUBJECT)
        with pytest.raises(RevokedKey):
            other.opening_key(first.chunk)
        keyring_admin.restore(other, SUBJECT)
        assert [info.state for info in keyring_admin.list_keys(other)] == [
            "retired",
            "retired",
            "active",
        ]


def test_an_export_contains_keys_of_both_purposes(tmp_path: Path, keyring: Keyring) -> None:
    image, original = keyring.sealing_key(SUBJECT), keyring.sealing_key(SUBJECT, "original")
    exported, phrase = tmp_path / "two.keys", Passphrase("for the court", CHEAP)
    assert export_subject(keyring, SUBJECT, exported, phrase) == 2
    with Keyring.create(tmp_path / "b.db", KeyFile(tmp_path / "b.key")) as other:
        assert import_subject(other, exported, phrase) == (SUBJECT, 2)
        keys = {row.purpose: other.unwrap(row) for row in other.rows}
        assert keys == {"image": image.key, "original": original.key}


def test_an_import_does_not_undo_a_destruction(tmp_path: Path, keyring: Keyring) -> None:
    seal_pixels(keyring)
    exported, phrase = tmp_path / "two.keys", Passphrase("for the court", CHEAP)
    export_subject(keyring, SUBJECT, exported, phrase)
    keyring_admin.destroy(keyring, SUBJECT)
    with pytest.raises(DestroyedKey, match="stays destroyed"):
        import_subject(keyring, exported, phrase)


def test_an_exported_key_imported_into_its_own_keyring_never_seals(
    tmp_path: Path, master: KeyFile, keyring: Keyring
) -> None:
    before, exported = tmp_path / "before.db", tmp_path / "two.keys"
    keyring_admin.backup(keyring, before, master)
    sealed, phrase = seal_pixels(keyring), Passphrase("for the court", CHEAP)
    export_subject(keyring, SUBJECT, exported, phrase)
    with Keyring.open(before, master) as again:  # the same keyring, in which that key is lost
        assert import_subject(again, exported, phrase) == (SUBJECT, 1)
        assert opens(again, sealed)
        keyring_admin.revoke(again, SUBJECT)
        keyring_admin.restore(again, SUBJECT)
        assert again.sealing_key(SUBJECT).key_id != keyring.rows[0].key_id


@pytest.mark.parametrize("place", [0, 4, 5, 6, 20, 60, 100, -1])
def test_a_changed_export_is_refused(tmp_path: Path, keyring: Keyring, place: int) -> None:
    seal_pixels(keyring)
    exported, phrase = tmp_path / "two.keys", Passphrase("for the court", CHEAP)
    export_subject(keyring, SUBJECT, exported, phrase)
    content = bytearray(exported.read_bytes())
    content[place] ^= 1
    exported.write_bytes(content)
    with pytest.raises(ValueError, match="export|passphrase|changed"):
        import_subject(keyring, exported, phrase)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"{}",
        b'{"subject": "a/b/1", "keys": [{"key_id": 1}]}',
        b'{"subject": "a/b/1", "keys": [{"key_id": "00"}]}',
        b'{"subject": "a/b/1", "keys": [{"key_id": "zz", "key": "00"}]}',
        b'{"subject": "a/b/1", "keys": [{"key_id": "00", "key": "00"}]}',
        b'{"subject": "a/b/1", "keys": [{"key_id": "00", "key": "00", "purpose": "seal"}]}',
        b'{"subject": "a/b/1", "keys": [{"key_id": "00", "key": "00", "purpose": [1]}]}',
        b'{"subject": "a/b/1", "keys": ["00"]}',
    ],
    ids=["empty", "cut", "no text", "deep", "list", "bare", "number", "no key", "no hex", "short",
         "purpose", "purposes", "text"],
)  # fmt: skip
def test_an_export_that_another_program_wrote_is_refused(
    tmp_path: Path, keyring: Keyring, content: bytes
) -> None:
    """Its author knows the passphrase, so authentication does not help."""
    phrase, params, salt = Passphrase("for the court", CHEAP), str(CHEAP).encode(), bytes(32)
    head = b"ISEX\x01" + bytes([len(params)]) + params + salt
    exported = tmp_path / "two.keys"
    stored = head + seal(phrase.unlock(str(CHEAP), salt), "export", head, content)
    secret_files.write_new_private(exported, stored)
    with pytest.raises(Tampered, match="does not write|keys of the wrong length"):
        import_subject(keyring, exported, phrase)
    assert keyring.rows == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a file of exported keys"),
        (b"PK\x03\x04 something else", "not a file of exported keys"),
        (b"ISEX\x01", "not a file of exported keys"),
        (b"ISEX\x01\x0em=8192,t=1,p=1" + bytes(31), "truncated inside the salt"),
        (b"ISEX\x01\x0em=9192,t=0,p=1" + bytes(99), "parameter t=0; allowed 1 to 8"),
        (b"ISEX\x01\x11m=4194304,t=3,p=4" + bytes(99), "m=4194304; allowed 8192 to 524288"),
        (b"ISEX\x01\x10m=262144,t=9,p=4" + bytes(99), "t=9; allowed 1 to 8"),
        (b"ISEX\x01\x0e\xff=8192,t=1,p=1" + bytes(99), "parameters of the export are damaged"),
        (b"ISEX\x01\x0em=8192,t=1,p=1" + bytes(1 << 20), "larger than any file of exported"),
    ],
)
def test_a_file_that_is_not_an_export_is_named(
    tmp_path: Path,
    keyring: Keyring,
    content: bytes,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported = tmp_path / "two.keys"
    secret_files.write_new_private(exported, content)

    def refuse(self: Passphrase, params: str, salt: bytes) -> bytes:
        raise AssertionError("memory and time were spent before the check")

    monkeypatch.setattr(Passphrase, "unlock", refuse)
    with pytest.raises(FormatError, match=message):
        import_subject(keyring, exported, Passphrase("for the court"))


def test_an_export_that_no_import_would_accept_is_not_made(
    tmp_path: Path, keyring: Keyring
) -> None:
    seal_pixels(keyring)
    phrase = Passphrase("for the court", Argon2Cost(memory_kib=1 << 20))
    with pytest.raises(UsageError, match="lower cost for an export"):
        export_subject(keyring, SUBJECT, tmp_path / "two.keys", phrase)
    assert not (tmp_path / "two.keys").exists()


def test_an_import_after_a_destruction_allows_no_new_key(tmp_path: Path, keyring: Keyring) -> None:
    exported, phrase = tmp_path / "two.keys", Passphrase("for the court", CHEAP)
    with Keyring.create(tmp_path / "b.db", KeyFile(tmp_path / "b.key")) as other:
        other.sealing_key(SUBJECT)
        export_subject(other, SUBJECT, exported, phrase)
    keyring.sealing_key(SUBJECT)
    keyring_admin.destroy(keyring, SUBJECT)
    import_subject(keyring, exported, phrase)
    with pytest.raises(DestroyedKey, match="rotate"):
        keyring.sealing_key(SUBJECT)
