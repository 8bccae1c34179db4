"""Keyring formats: 1 and 2 are read and converted to 3; a row is written in constant time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from engine.vault import keyring_admin
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import import_subject
from engine.vault.keyring_rows import OLD_FORMATS, KeyRow, RowSet
from engine.vault.keyring_store import KeyringStore
from engine.vault.master import KeyFile, Passphrase
from modeling.encryption.ised_errors import KeyringCorrupt, RevokedKey
from tests.fixtures.keyrings import after, to_format
from tests.fixtures.paths import GOLDEN

SUBJECTS = [f"market/test/{pid}" for pid in range(1, 6)]


@pytest.fixture
def keyring(path: Path, master: KeyFile) -> Keyring:
    keyring = Keyring.create(path, master)
    keyring.ensure(SUBJECTS)
    return keyring


def _edit(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)
    connection.close()


def _format(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        (number,) = connection.execute("SELECT format FROM keyring").fetchone()
    connection.close()
    return int(number)


@pytest.mark.parametrize("former", OLD_FORMATS)
def test_reading_keeps_an_older_format_and_the_first_write_converts_it(
    path: Path, master: KeyFile, keyring: Keyring, former: int
) -> None:
    keys = [keyring.sealing_key(subject).key for subject in SUBJECTS]
    to_format(former, keyring)
    with Keyring.open(path, master) as reader:
        assert [reader.sealing_key(subject).key for subject in SUBJECTS] == keys
        assert reader.audit_state() == (0, bytes(32))
        assert _format(path) == former
        keyring_admin.revoke(keyring, SUBJECTS[0])
        assert _format(path) == 3
        with pytest.raises(RevokedKey):  # a process that has the keyring open reads it again
            reader.sealing_key(SUBJECTS[0])
        assert reader.audit_key() == keyring.audit_key()
    with Keyring.open(path, master) as again:
        assert [again.sealing_key(subject).key for subject in SUBJECTS[1:]] == keys[1:]
        assert {row.purpose for row in again.rows} == {"image"}


@pytest.mark.parametrize("former", OLD_FORMATS)
@pytest.mark.parametrize("name", ["audit_key", "signing_key"])
def test_a_new_service_key_is_made_by_a_conversion(
    path: Path, master: KeyFile, keyring: Keyring, former: int, name: str
) -> None:
    to_format(former, keyring)

    def secret(keyring: Keyring) -> bytes:
        key = getattr(keyring, name)()
        return key if isinstance(key, bytes) else key.private_bytes_raw()

    made = secret(keyring)
    assert len(made) == 32
    assert _format(path) == 3
    with Keyring.open(path, master) as again:
        assert secret(again) == made


def test_a_conversion_stores_the_last_possible_use(
    path: Path, master: KeyFile, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older formats do not contain the last use; too early a day would expire keys in use."""
    keyring_admin.destroy(keyring, SUBJECTS[0])
    created = keyring.rows_of(SUBJECTS[1])[0].created_day
    to_format(2, keyring)
    for module in ("keyring", "keyring_store"):
        monkeypatch.setattr(f"engine.vault.{module}.today", lambda: created + 9)
    with Keyring.open(path, master) as opened:
        keyring_admin.revoke(opened, SUBJECTS[2])
        assert _format(path) == 3
        days = [opened.rows_of(subject)[0].used_day - created for subject in SUBJECTS[:3]]
        assert days == [0, 9, 9]


@pytest.mark.parametrize("former", OLD_FORMATS)
def test_a_rekey_converts(path: Path, keyring: Keyring, former: int) -> None:
    to_format(former, keyring)
    new = KeyFile(path.with_name("new.key"))
    keyring_admin.rekey(keyring, new)
    assert _format(path) == 3
    Keyring.open(path, new).close()


@pytest.mark.parametrize("call", [1, 3, 5, "head", "commit"])
@pytest.mark.parametrize("former", OLD_FORMATS)
def test_kill_9_during_a_conversion_leaves_the_old_or_the_new_format(
    path: Path, master: KeyFile, keyring: Keyring, former: int, call: int | str
) -> None:
    keys = [keyring.sealing_key(subject).key for subject in SUBJECTS]
    to_format(former, keyring)
    keyring.close()

    def child() -> None:
        left = call if isinstance(call, int) else 1
        name = {"head": "put_head", "commit": "transaction"}.get(str(call), "put_row")

        def kill() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        with Keyring.open(path, master) as opened:
            if call == "commit":
                with opened.writing():
                    pass
                kill()
            setattr(KeyringStore, name, after(getattr(KeyringStore, name), kill))
            opened.audit_key()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with Keyring.open(path, master) as again:
        assert _format(path) == (3 if call == "commit" else former)
        assert [again.sealing_key(subject).key for subject in SUBJECTS] == keys
        assert again.signing_key()


@pytest.mark.parametrize("former", [1, 2, 3])
@pytest.mark.parametrize("edit", ["state", "drop", "swap"])
def test_edited_rows_are_noticed_in_every_format(
    path: Path, master: KeyFile, keyring: Keyring, former: int, edit: str
) -> None:
    if former < 3:
        to_format(former, keyring)
    keyring.close()
    if edit == "state":
        _edit(path, "UPDATE keys SET state = 'retired' WHERE rowid = 2")
    elif edit == "drop":
        _edit(path, "DELETE FROM keys WHERE rowid = 2")
    else:
        _edit(path, "UPDATE keys SET created_day = created_day - rowid + 3")  # same sum of days
    with pytest.raises(KeyringCorrupt, match="edited, removed or put back"):
        Keyring.open(path, master)


def test_an_older_row_with_an_older_record_is_noticed(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    """Two sums in clear would show the difference that puts one row back; a record is sealed."""
    before = keyring.rows_of(SUBJECTS[0])[0]
    old_record = keyring.head.rows_mac
    keyring_admin.revoke(keyring, SUBJECTS[0])
    keyring_admin.revoke(keyring, SUBJECTS[1])
    keyring.close()
    restore = "UPDATE keys SET state = ?, wrapped = ? WHERE key_id = ?"
    _edit(path, restore, before.state, before.wrapped, before.key_id)
    for record in (None, old_record):
        if record is not None:
            _edit(path, "UPDATE keyring SET rows_mac = ?", record)
        with pytest.raises(KeyringCorrupt):
            Keyring.open(path, master)


def test_a_record_of_another_epoch_or_format_is_noticed(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    keyring.close()
    for column, value in (("epoch", 1), ("format", 2), ("audit_count", 1)):
        copy = path.with_name(f"{column}.db")
        shutil.copy(path, copy)
        copy.chmod(0o600)
        _edit(copy, f"UPDATE keyring SET {column} = ?", value)
        with pytest.raises(KeyringCorrupt):
            Keyring.open(copy, master)


def test_a_write_reads_and_hashes_only_its_own_rows(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of a new key does not depend on the number of rows."""
    hashed: list[KeyRow] = []
    of_row = RowSet._hash

    def counted(self: RowSet, row: KeyRow) -> int:
        hashed.append(row)
        return of_row(self, row)

    def refuse(*_: object) -> None:
        raise AssertionError("the whole table was read")

    monkeypatch.setattr(RowSet, "_hash", counted)
    monkeypatch.setattr(KeyringStore, "rows", refuse)
    keyring.sealing_key("market/test/new")
    assert len(hashed) == 1
    keyring_admin.revoke(keyring, SUBJECTS[0])
    assert len(hashed) == 3  # the row before and after


def test_writes_of_two_processes_are_both_kept(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    with Keyring.open(path, master) as other:
        for index in range(3):
            keyring.sealing_key(f"market/a/{index}")
            other.sealing_key(f"market/b/{index}")
    with Keyring.open(path, master) as again:
        assert len(again.rows) == len(SUBJECTS) + 6


def test_a_failed_write_leaves_the_keyring_usable(
    path: Path, master: KeyFile, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Keyring) -> None:
        raise OSError(5, "I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(Keyring, "_put_head", fail)
        with pytest.raises(OSError, match="I/O"):
            keyring.sealing_key("market/test/new")
    keyring.refresh()
    assert keyring.rows_of("market/test/new") == []
    keyring.sealing_key("market/test/new")
    Keyring.open(path, master).close()


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE keys SET purpose = 'original' WHERE rowid = 2",
        "UPDATE keys SET used_day = used_day + 1 WHERE rowid = 2",
        "UPDATE keyring SET audit_hash = zeroblob(32), audit_count = 0",
        "UPDATE keyring SET audit_hash = zeroblob(32)",
        "UPDATE service SET wrapped = zeroblob(112) WHERE name = 'sign'",
        "DELETE FROM service WHERE name = 'audit'",
    ],
)
def test_purpose_last_use_audit_state_and_new_service_keys_are_authenticated(
    path: Path, master: KeyFile, keyring: Keyring, edit: str
) -> None:
    with keyring.writing():
        keyring.set_audit_state(4, b"h" * 32)
    keyring.close()
    _edit(path, edit)
    with pytest.raises(KeyringCorrupt):
        Keyring.open(path, master)


def test_a_key_of_another_purpose_does_not_unwrap(keyring: Keyring) -> None:
    (row,) = keyring.rows_of(SUBJECTS[0])
    keyring._unwrapped.clear()
    with pytest.raises(KeyringCorrupt):
        keyring.unwrap(replace(row, purpose="original"))


def test_the_audit_state_survives_a_rekey(path: Path, keyring: Keyring) -> None:
    with keyring.writing():
        keyring.set_audit_state(4, b"h" * 32)
    secrets = keyring.audit_key(), keyring.signing_key().private_bytes_raw()
    new = KeyFile(path.with_name("new.key"))
    keyring_admin.rekey(keyring, new)
    with Keyring.open(path, new) as again:
        assert again.audit_state() == (4, b"h" * 32)
        assert (again.audit_key(), again.signing_key().private_bytes_raw()) == secrets


def test_known_answer_of_format_1(tmp_path: Path) -> None:
    """A keyring written by an earlier version: everything in it must stay the same for ever."""
    known = json.loads((GOLDEN / "keyring_v1.json").read_text(encoding="utf-8"))
    path, master, exported = tmp_path / "keys.db", tmp_path / "master.key", tmp_path / "one.keys"
    for secret, content in ((path, ""), (master, known["master"]), (exported, known["export"])):
        secret.touch(0o600)
        secret.write_bytes(bytes.fromhex(content))
    connection = sqlite3.connect(path)
    connection.executescript("\n".join(known["sql"]))
    connection.execute(f"PRAGMA application_id = {0x49534544}")
    connection.close()
    for format_number in (1, 3):
        assert _format(path) == format_number
        with Keyring.open(path, KeyFile(master)) as keyring:
            infos = keyring_admin.list_keys(keyring)
            assert [[info.subject, info.generation, info.state] for info in infos] == known[
                "listed"
            ]
            active = keyring.sealing_key("set/test/1")
            assert [active.key_id.hex(), active.key.hex()] == known["keys"]["active"]
            assert active.locator_key.hex() == known["locator_key"]
            key_id, key = known["keys"]["retired"]
            row = keyring.row(bytes.fromhex(key_id))
            assert row is not None
            assert keyring.unwrap(row).hex() == key
            with pytest.raises(RevokedKey):
                keyring.sealing_key("set/test/2")
            assert keyring.file_name("set", "a/b.jpg") == known["file_name"]
            assert keyring.manifest_key().hex() == known["manifest_key"]
            phrase = Passphrase(known["passphrase"])
            assert import_subject(keyring, exported, phrase) == ("set/test/elsewhere", 0)
