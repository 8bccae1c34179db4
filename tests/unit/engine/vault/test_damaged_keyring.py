"""A keyring that was edited, damaged or is readable by others."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from engine.vault import keyring_admin, secret_files
from engine.vault.keyring import Keyring
from engine.vault.master import Argon2Cost, KeyFile, Passphrase
from modeling.encryption.ised_errors import (
    InsecurePermissions,
    KeyringCorrupt,
    KeyringError,
    StorageError,
)
from tests.fixtures.keyrings import CHEAP, SUBJECT, seal_pixels


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
    "unknown master": "UPDATE keyring SET kdf = 'none'",
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
    connection.execute("PRAGMA ignore_check_constraints = ON")
    connection.execute(EDITS[edit])
    connection.commit()
    connection.close()
    with pytest.raises(KeyringCorrupt):
        Keyring.open(path, master)


def test_restoring_an_old_row_is_refused(path: Path, master: KeyFile, keyring: Keyring) -> None:
    seal_pixels(keyring)
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
