"""The keyring: use, administration, concurrent processes, and a file that was edited by hand."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.vault import keyring_admin, secret_files
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import export_subject, import_subject
from engine.vault.master import Argon2Cost, KeyFile, Passphrase
from modeling.encryption.ised_errors import (
    BadInput,
    DestroyedKey,
    FormatError,
    InsecurePermissions,
    KeyringCorrupt,
    KeyringError,
    KeyringExists,
    KeyringLocked,
    KeyringMissing,
    MissingKey,
    RevokedKey,
    StorageError,
    Tampered,
    UsageError,
    WrongMaster,
)
from modeling.encryption.primitives import fresh_message_key, seal
from modeling.encryption.sealed_image import Metadata, SealedImage, open_image, seal_image

CHEAP = Argon2Cost(memory_kib=8 * 1024, iterations=1, lanes=1)
SUBJECT = "market/test/2"
PIXELS = np.zeros((4, 8, 3), np.uint8)


@pytest.fixture
def keyring(path: Path, master: KeyFile) -> Keyring:
    return Keyring.create(path, master)


def _seal(keyring: Keyring, subject: str = SUBJECT) -> SealedImage:
    return seal_image(keyring.sealing_key(subject), PIXELS, Metadata())


def _opens(keyring: Keyring, sealed: SealedImage) -> bool:
    opened = open_image(keyring.opening_key(sealed.chunk), sealed)
    return bool(np.array_equal(opened.pixels, PIXELS))


def _states(keyring: Keyring) -> list[tuple[int, str]]:
    return [(info.generation, info.state) for info in keyring_admin.list_keys(keyring)]


def test_files_of_a_keyring_are_private_and_keys_are_stored(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    for secret in (path, master.path):
        assert secret.stat().st_mode & 0o777 == 0o600
    assert len(master.path.read_bytes()) == 32
    sealed = _seal(keyring)
    keyring.close()
    with Keyring.open(path, master) as again:
        assert _opens(again, sealed)
        assert again.sealing_key(SUBJECT).key_id == again.rows[0].key_id
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


def test_no_identity_is_readable_in_the_file(path: Path, keyring: Keyring) -> None:
    keyring.ensure([SUBJECT, "market/test/anna-schmidt"])
    content = path.read_bytes()
    assert b"anna" not in content
    assert b"market" not in content
    assert sorted(info.subject or "" for info in keyring_admin.list_keys(keyring)) == [
        SUBJECT,
        "market/test/anna-schmidt",
    ]


def test_a_keyring_opens_with_its_passphrase_only(path: Path, master: KeyFile) -> None:
    Keyring.create(path, Passphrase("correct horse", CHEAP)).close()
    Keyring.open(path, Passphrase("correct horse")).close()
    with pytest.raises(WrongMaster, match=r"not that of .*keys\.db; give the master from `init`"):
        Keyring.open(path, Passphrase("incorrect horse"))
    master.create_if_missing()
    with pytest.raises(WrongMaster, match="opened by a passphrase"):
        Keyring.open(path, master)
    assert "horse" not in repr(Passphrase("correct horse"))


def test_an_accent_in_a_passphrase_may_be_composed_or_decomposed(path: Path) -> None:
    Keyring.create(path, Passphrase("cr\u00e8me br\u00fbl\u00e9e", CHEAP)).close()
    Keyring.open(path, Passphrase("cre\u0300me bru\u0302le\u0301e")).close()
    with pytest.raises(WrongMaster):
        Keyring.open(path, Passphrase("creme brulee"))
    with pytest.raises(UsageError, match="passphrase has 7 characters"):
        Passphrase("caf\u00e9 au".replace("\u00e9", "e\u0301")).check_strength()


def test_short_passphrase_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="at least 8"):
        Keyring.create(path, Passphrase("short", CHEAP))
    assert list(path.parent.iterdir()) == []


def test_wrong_and_missing_master_files(path: Path, master: KeyFile, keyring: Keyring) -> None:
    other = KeyFile(master.path.with_name("other.key"))
    with pytest.raises(KeyringMissing, match="does not exist"):
        Keyring.open(path, other)
    other.create_if_missing()
    with pytest.raises(WrongMaster):
        Keyring.open(path, other)
    master.path.write_bytes(b"too short")
    with pytest.raises(WrongMaster, match="9 bytes; expected 32"):
        Keyring.open(path, master)


def test_rotate_keeps_former_files_open(keyring: Keyring) -> None:
    old = _seal(keyring)
    keyring_admin.rotate(keyring, SUBJECT)
    new = _seal(keyring)
    assert _states(keyring) == [(1, "retired"), (2, "active")]
    assert _opens(keyring, old)
    assert _opens(keyring, new)


def test_revoked_keys_neither_open_nor_seal_until_restored(keyring: Keyring) -> None:
    sealed = _seal(keyring)
    keyring_admin.rotate(keyring, SUBJECT)
    assert keyring_admin.revoke(keyring, SUBJECT) == 2
    for use in (lambda: keyring.opening_key(sealed.chunk), lambda: keyring.sealing_key(SUBJECT)):
        with pytest.raises(RevokedKey, match="--undo"):
            use()
    keyring.ensure([SUBJECT])  # skips it
    assert keyring_admin.restore(keyring, SUBJECT) == 2
    assert _states(keyring) == [(1, "retired"), (2, "active")]
    assert _opens(keyring, sealed)


def test_revoke_and_its_undo_can_be_repeated(keyring: Keyring) -> None:
    _seal(keyring)
    for act, count in (
        (keyring_admin.restore, 0),
        (keyring_admin.revoke, 1),
        (keyring_admin.revoke, 0),
        (keyring_admin.restore, 1),
        (keyring_admin.restore, 0),
    ):
        assert act(keyring, SUBJECT) == count


def test_destroy_erases_key_and_label_from_the_file(path: Path, keyring: Keyring) -> None:
    sealed = _seal(keyring)
    keyring.ensure(f"market/test/{pid}" for pid in range(3, 60))
    row = keyring.rows_of(SUBJECT)[0]
    assert row.wrapped is not None
    assert row.label_ct is not None
    assert row.wrapped in path.read_bytes()
    assert keyring_admin.destroy(keyring, SUBJECT) == 1
    content = path.read_bytes()
    for secret in (row.wrapped, row.label_ct):
        for start in range(0, len(secret) - 8, 8):
            assert secret[start : start + 8] not in content
    assert row.key_id in content  # the tombstone
    with pytest.raises(DestroyedKey, match="gone for good"):
        keyring.opening_key(sealed.chunk)
    with pytest.raises(DestroyedKey, match="rotate"):
        keyring.sealing_key(SUBJECT)
    assert keyring_admin.destroy(keyring, SUBJECT) == 0  # the command may have been killed
    for act in (keyring_admin.revoke, keyring_admin.restore):
        with pytest.raises(MissingKey):
            act(keyring, SUBJECT)
    keyring_admin.rotate(keyring, SUBJECT)
    assert _opens(keyring, _seal(keyring))


def test_a_subject_has_an_active_key_for_each_purpose(path: Path, keyring: Keyring) -> None:
    image, original = keyring.sealing_key(SUBJECT), keyring.sealing_key(SUBJECT, "original")
    assert image.key_id != original.key_id
    keyring.ensure([SUBJECT, "market/test/3"], "original")
    assert keyring.sealing_key(SUBJECT, "original").key_id == original.key_id
    purposes = [row.purpose for row in keyring.rows_of(SUBJECT)]
    assert purposes == ["image", "original"]
    assert [row.key_id for row in keyring.rows_of(SUBJECT, "original")] == [original.key_id]
    assert [row.purpose for row in keyring.rows_of("market/test/3")] == ["original"]
    keyring_admin.rotate(keyring, SUBJECT, "original")
    assert keyring.sealing_key(SUBJECT).key_id == image.key_id
    new = {info.purpose: info.generation for info in keyring_admin.rotate(keyring, SUBJECT)}
    assert new == {"image": 2, "original": 3}
    assert keyring_admin.revoke(keyring, SUBJECT) == 5
    assert keyring_admin.restore(keyring, SUBJECT) == 5
    active = [row for row in keyring.rows_of(SUBJECT) if row.state == "active"]
    assert [(row.purpose, row.generation) for row in active] == [("image", 2), ("original", 3)]
    keyring_admin.destroy(keyring, SUBJECT)
    for purpose, option in (("image", ""), ("original", " --original")):
        with pytest.raises(DestroyedKey, match=f"`keyring rotate{option}`"):
            keyring.sealing_key(SUBJECT, purpose)


def test_an_erased_or_revoked_subject_gets_no_key_for_originals(keyring: Keyring) -> None:
    keyring.ensure(["s/1", "s/2"])
    keyring_admin.destroy(keyring, "s/1")
    keyring_admin.revoke(keyring, "s/2")
    keyring.ensure(["s/1", "s/2"], "original")
    assert len(keyring.rows) == 2
    with pytest.raises(DestroyedKey):
        keyring.sealing_key("s/1", "original")
    keyring_admin.rotate(keyring, "s/1")
    keyring.sealing_key("s/1", "original")


def test_the_last_use_is_written_once_a_day(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = [keyring.sealing_key(SUBJECT) and keyring.rows_of(SUBJECT)[0].used_day]
    monkeypatch.setattr("engine.vault.keyring.today", lambda: day[0])
    writes = []
    writing = Keyring.writing

    def counted(self: Keyring) -> Any:
        writes.append(day[0])
        return writing(self)

    monkeypatch.setattr(Keyring, "writing", counted)
    day[0] += 3
    for _ in range(3):
        keyring.sealing_key(SUBJECT)
    keyring.ensure([SUBJECT])
    assert len(writes) == 1
    day[0] += 1
    keyring.ensure([SUBJECT, "market/test/3"])
    keyring.sealing_key(SUBJECT)
    assert len(writes) == 2
    (info,) = keyring_admin.list_keys(keyring, SUBJECT)
    assert (info.used - info.created).days == 4
    day[0] -= 2  # a clock that was set back does not move the last use back
    keyring.sealing_key(SUBJECT)
    assert len(writes) == 2


def test_unknown_subject_is_named(keyring: Keyring) -> None:
    for act in (keyring_admin.rotate, keyring_admin.revoke, keyring_admin.destroy):
        with pytest.raises(MissingKey, match="no key of subject 'unknown'"):
            act(keyring, "unknown")
    with pytest.raises(BadInput, match="1 to 1024"):
        keyring.sealing_key("")


def test_sealed_files_open_after_a_rekey(path: Path, master: KeyFile, keyring: Keyring) -> None:
    sealed, name = _seal(keyring), keyring.file_name("market", "a/b.jpg")
    keyring_admin.destroy(keyring, _other(keyring))
    new = Passphrase("a new passphrase", CHEAP)
    keyring_admin.rekey(keyring, new)
    assert _opens(keyring, sealed)
    keyring.close()
    with pytest.raises(WrongMaster):
        Keyring.open(path, master)
    with Keyring.open(path, new) as again:
        assert _opens(again, sealed)
        assert again.file_name("market", "a/b.jpg") == name
        assert again.head.epoch == 1
        with pytest.raises(UsageError, match="exists already"):
            keyring_admin.rekey(again, master)


def _other(keyring: Keyring) -> str:
    _seal(keyring, "market/test/9")
    return "market/test/9"


def test_a_rekey_by_another_process_stops_this_one(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    with Keyring.open(path, master) as other:
        keyring_admin.rekey(keyring, KeyFile(path.with_name("new.key")))
        with pytest.raises(KeyringError, match="master was changed"):
            other.sealing_key(SUBJECT)


def test_an_open_keyring_notices_a_revocation(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    sealed = _seal(keyring)
    with Keyring.open(path, master) as other:
        assert _opens(other, sealed)
        keyring_admin.revoke(keyring, SUBJECT)
        with pytest.raises(RevokedKey):
            other.opening_key(sealed.chunk)


def test_backup_is_a_working_keyring(path: Path, master: KeyFile, keyring: Keyring) -> None:
    sealed, target = _seal(keyring), path.with_name("copy.db")
    assert keyring_admin.backup(keyring, target, master) == 1
    assert target.stat().st_mode & 0o777 == 0o600
    with Keyring.open(target, master) as copy:
        assert _opens(copy, sealed)
    with pytest.raises(KeyringExists, match="never overwrites"):
        keyring_admin.backup(keyring, target, master)


def test_an_export_opens_one_subject_only(tmp_path: Path, keyring: Keyring) -> None:
    first = _seal(keyring)
    keyring_admin.rotate(keyring, SUBJECT)
    second, foreign = _seal(keyring), _seal(keyring, "market/test/3")
    exported, phrase = tmp_path / "two.keys", Passphrase("for the court", CHEAP)
    assert export_subject(keyring, SUBJECT, exported, phrase) == 2
    with pytest.raises(KeyringExists):
        export_subject(keyring, SUBJECT, exported, phrase)
    with Keyring.create(tmp_path / "b.db", KeyFile(tmp_path / "b.key")) as other:
        assert import_subject(other, exported, phrase) == (SUBJECT, 2)
        assert import_subject(other, exported, phrase) == (SUBJECT, 0)
        assert _opens(other, first)
        assert _opens(other, second)
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
    _seal(keyring)
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
    sealed, phrase = _seal(keyring), Passphrase("for the court", CHEAP)
    export_subject(keyring, SUBJECT, exported, phrase)
    with Keyring.open(before, master) as again:  # the same keyring, in which that key is lost
        assert import_subject(again, exported, phrase) == (SUBJECT, 1)
        assert _opens(again, sealed)
        keyring_admin.revoke(again, SUBJECT)
        keyring_admin.restore(again, SUBJECT)
        assert again.sealing_key(SUBJECT).key_id != keyring.rows[0].key_id


@pytest.mark.parametrize("place", [0, 4, 5, 6, 20, 60, 100, -1])
def test_a_changed_export_is_refused(tmp_path: Path, keyring: Keyring, place: int) -> None:
    _seal(keyring)
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
    _seal(keyring)
    phrase = Passphrase("for the court", Argon2Cost(memory_kib=1 << 20))
    with pytest.raises(UsageError, match="lower cost for an export"):
        export_subject(keyring, SUBJECT, tmp_path / "two.keys", phrase)
    assert not (tmp_path / "two.keys").exists()


def test_a_secret_must_be_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("folder", "pipe"):
        with pytest.raises(InsecurePermissions, match="is not a regular file"):
            secret_files.read_private(tmp_path / name, "keyring")


EDITS = {
    "un-revoke": "UPDATE keys SET state = 'retired'",
    "swap rows": "UPDATE keys SET wrapped = (SELECT wrapped FROM keys LIMIT 1)",
    "drop a row": "DELETE FROM keys WHERE rowid = 1",
    "relabel": "UPDATE keys SET label_ct = x'00'",
    "generation": "UPDATE keys SET generation = generation + 1",
    "wrong type": "UPDATE keys SET created_day = 'monday'",
    "service key": "UPDATE service SET wrapped = zeroblob(112) WHERE name = 'locate'",
    "drop a service key": "DELETE FROM service WHERE name = 'name'",
    "service key of another type": "UPDATE service SET wrapped = 5 WHERE name = 'name'",
    "service key as text": "UPDATE service SET wrapped = 'abc' WHERE name = 'name'",
    "epoch": "UPDATE keyring SET epoch = 7",
    "epoch below zero": "UPDATE keyring SET epoch = -1",
    "keyring id": "UPDATE keyring SET keyring_id = zeroblob(16)",
    "former format": "UPDATE keyring SET format = 1",
    "unknown format": "UPDATE keyring SET format = 4",
    "trigger": "CREATE TRIGGER t AFTER UPDATE ON keys BEGIN SELECT 1; END",
    "view": "CREATE VIEW v AS SELECT * FROM keys",
    "huge label": "UPDATE keys SET label_ct = zeroblob(3000)",
    "huge key": "UPDATE keys SET wrapped = zeroblob(300000) WHERE rowid = 1",
    "huge head": "UPDATE keyring SET kdf_params = zeroblob(3000)",
    "no head": "DELETE FROM keyring",
    "other application": "PRAGMA application_id = 1",
}


@pytest.mark.parametrize("edit", sorted(EDITS))
def test_an_edited_file_is_refused(
    path: Path, master: KeyFile, keyring: Keyring, edit: str
) -> None:
    keyring.ensure([SUBJECT, "market/test/3"])
    keyring_admin.revoke(keyring, SUBJECT)
    keyring.close()
    connection = sqlite3.connect(path)
    connection.execute(EDITS[edit])
    connection.commit()
    connection.close()
    with pytest.raises(KeyringCorrupt):
        Keyring.open(path, master)


def test_restoring_an_old_row_is_refused(path: Path, master: KeyFile, keyring: Keyring) -> None:
    _seal(keyring)
    old = keyring.rows[0]
    keyring_admin.revoke(keyring, SUBJECT)
    keyring.close()
    connection = sqlite3.connect(path)  # the old row is complete, and its own wrap opens
    connection.execute("UPDATE keys SET state = ?, wrapped = ?", (old.state, old.wrapped))
    connection.commit()
    connection.close()
    with pytest.raises(KeyringCorrupt, match="put back"):
        Keyring.open(path, master)


@pytest.mark.parametrize("params", ["m=999999999,t=3,p=4", "m=1,t=1,p=1", "m=65536,t=0,p=4", "x"])
def test_passphrase_parameters_are_checked_before_memory_is_taken(path: Path, params: str) -> None:
    Keyring.create(path, Passphrase("correct horse", CHEAP)).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE keyring SET kdf_params = ?", (params,))
    connection.commit()
    connection.close()
    with pytest.raises(KeyringCorrupt, match="passphrase parameter"):
        Keyring.open(path, Passphrase("correct horse"))


def test_bounds_of_passphrase_parameters() -> None:
    """The default is that of docs/ISED.md; stored parameters are bounded."""
    assert str(Argon2Cost()) == "m=262144,t=3,p=4"
    for allowed in ("m=8192,t=1,p=1", "m=4194304,t=64,p=64"):
        assert str(Argon2Cost.parse(allowed)) == allowed
    for refused in (
        "m=8191,t=1,p=1", "m=4194305,t=1,p=1", "m=8192,t=0,p=1", "m=8192,t=65,p=1",
        "m=8192,t=1,p=0", "m=8192,t=1,p=65",
    ):  # fmt: skip
        with pytest.raises(KeyringCorrupt, match="passphrase parameter"):
            Argon2Cost.parse(refused)
    with pytest.raises(KeyringCorrupt, match="salt of 31 bytes; expected 32"):
        Passphrase("correct horse").unlock(str(CHEAP), bytes(31))


@pytest.mark.parametrize(
    "content", [b"", b"no database at all" * 99, b"SQLite format 3\0" + b"x" * 999]
)
def test_a_file_that_is_not_a_keyring_is_refused(
    path: Path, master: KeyFile, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, connect = [], sqlite3.connect

    def noting(*args: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*args, **options))
        return made[-1]

    master.create_if_missing()
    path.touch(0o600)
    path.write_bytes(content)
    monkeypatch.setattr(sqlite3, "connect", noting)
    with pytest.raises(KeyringCorrupt):
        Keyring.open(path, master)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        made[0].execute("SELECT 1")


def test_damaged_pages_are_refused_or_harmless(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    keyring.ensure(f"s/{pid}" for pid in range(40))
    ids = {row.key_id for row in keyring.rows}
    keyring.close()
    good = path.read_bytes()
    for place in range(30, len(good), 611):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            with Keyring.open(path, master) as opened:
                assert {row.key_id for row in opened.rows} == ids
        except (KeyringError, StorageError):
            continue


def test_a_damaged_schema_is_named(path: Path, master: KeyFile, keyring: Keyring) -> None:
    """SQLite quotes the damaged text in its message, which then is not UTF-8."""
    keyring.close()
    good = path.read_bytes()
    for word in (b"keyring_id BLOB", b"TABLE keys", b"one_active ON", b"sqlite_autoindex_keys"):
        path.write_bytes(good.replace(word, b"\xff" + word[1:]))
        with pytest.raises(KeyringCorrupt):
            Keyring.open(path, master)


def test_missing_and_existing_keyring(path: Path, master: KeyFile) -> None:
    with pytest.raises(KeyringMissing, match="does not exist"):
        Keyring.open(path, master)
    assert not path.exists()
    Keyring.create(path, master).close()
    before = path.read_bytes()
    with pytest.raises(KeyringExists, match="give another --keyring"):
        Keyring.create(path, master)
    assert path.read_bytes() == before


def test_locked_keyring(path: Path, master: KeyFile, keyring: Keyring) -> None:
    with (
        keyring.store.transaction(write=True),
        Keyring.open(path, master, busy_timeout_ms=50) as other,
        pytest.raises(KeyringLocked, match="another process"),
    ):
        other.sealing_key(SUBJECT)


@pytest.mark.parametrize("which", ["keyring", "master"])
def test_insecure_permissions_name_the_command_that_fixes_them(
    path: Path, master: KeyFile, keyring: Keyring, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = path if which == "keyring" else master.path
    target.chmod(0o640)
    with pytest.raises(InsecurePermissions, match=f"chmod 600 {target}"):
        Keyring.open(path, master)
    target.chmod(0o600)
    moved = target.rename(target.with_name("moved"))
    target.symlink_to(moved)
    with pytest.raises(InsecurePermissions, match="symbolic link"):
        Keyring.open(path, master)
    target.unlink()
    moved.rename(target)
    monkeypatch.setattr(os, "geteuid", lambda: target.stat().st_uid + 1)
    with pytest.raises(InsecurePermissions, match="belongs to user"):
        Keyring.open(path, master)


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_a_secret_replaced_after_its_check_is_refused(
    master: KeyFile, keyring: Keyring, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = secret_files.check_private

    def swapping(path: Path, what: str) -> os.stat_result:
        status = check(path, what)
        other = path.with_name("other")
        other.write_bytes(bytes(32)) if kind == "file" else os.mkfifo(other)
        other.replace(path)
        return status

    monkeypatch.setattr(secret_files, "check_private", swapping)
    with pytest.raises(InsecurePermissions, match="was replaced"):
        master.unlock("", b"")


def _race(job: Callable[[Path, int], str], path: Path, count: int = 8) -> list[str]:
    context = multiprocessing.get_context("fork")
    with context.Pool(count) as pool:
        return pool.starmap(job, [(path, index) for index in range(count)], chunksize=1)


def _init(path: Path, index: int) -> str:
    try:
        Keyring.create(path, KeyFile(path.with_name("master.key"))).close()
    except KeyringExists:
        return "exists"
    return "made"


def _make_keys(path: Path, index: int) -> str:
    with Keyring.open(path, KeyFile(path.with_name("master.key"))) as keyring:
        order = [(index + step) % 12 for step in range(12)]
        return ",".join(f"{n}:{keyring.sealing_key(f's/{n}').key_id.hex()}" for n in sorted(order))


def test_eight_processes_race_on_init_and_on_key_creation(path: Path) -> None:
    assert sorted(_race(_init, path)) == ["exists"] * 7 + ["made"]
    assert len(set(_race(_make_keys, path))) == 1  # all got the same twelve keys
    with Keyring.open(path, KeyFile(path.with_name("master.key"))) as keyring:
        assert [row.state for row in keyring.rows] == ["active"] * 12
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


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


def test_a_file_system_without_hard_links_never_replaces_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "secret"
    secret_files.write_new_private(path, b"first")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        secret_files.write_new_private(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "link", full_disk)
    with pytest.raises(StorageError, match="No space"):
        secret_files.write_new_private(tmp_path / "other", b"third")
    assert list(tmp_path.iterdir()) == [path]


def full_disk(source: Path, target: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_backup_contains_tombstones(tmp_path: Path, master: KeyFile, keyring: Keyring) -> None:
    keyring.ensure([SUBJECT, "market/test/3"])
    keyring_admin.destroy(keyring, SUBJECT)
    copy = tmp_path / "copy.db"
    assert keyring_admin.backup(keyring, copy, master) == 2
    with Keyring.open(copy, master) as again, pytest.raises(DestroyedKey):
        again.sealing_key(SUBJECT)


def test_a_closed_keyring_closes_its_connections(
    path: Path, master: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, connect = [], sqlite3.connect

    def noting(*args: Any, **options: Any) -> sqlite3.Connection:
        made.append(connect(*args, **options))
        return made[-1]

    monkeypatch.setattr(sqlite3, "connect", noting)
    Keyring.create(path, master).close()
    with Keyring.open(path, master):
        pass
    other = KeyFile(path.with_name("other.key"))
    other.create_if_missing()
    with pytest.raises(WrongMaster):
        Keyring.open(path, other)
    assert len(made) >= 4
    for connection in made:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_keys_are_not_in_representations(keyring: Keyring) -> None:
    key = keyring.sealing_key(SUBJECT).key
    assert repr(keyring.sealing_key(SUBJECT)) == "SubjectKey(...)"
    message_key = fresh_message_key(key, "file")
    assert "_encryption_key" not in repr(message_key)


def test_leftovers_of_a_killed_init_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".master.key.99999999-0badcafe.tmp"
    left.write_bytes(b"a copy of a secret")
    KeyFile(tmp_path / "master.key").create_if_missing()
    assert not left.exists()


def test_invalid_text_and_too_little_memory_are_named(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="UTF-8"):
        keyring.sealing_key("market/\udcff")
    with pytest.raises(UsageError, match="UTF-8"):
        Passphrase("correct \udcff", CHEAP).unlock(str(CHEAP), bytes(32))

    def starve(**_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("engine.vault.master.Argon2id", starve)
    with pytest.raises(StorageError, match="8 MiB of memory"):
        Passphrase("correct horse", CHEAP).unlock(str(CHEAP), bytes(32))
