"""The keyring: use, administration and concurrent processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.vault import keyring_admin, secret_files
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile, Passphrase
from modeling.encryption.ised_errors import (
    BadInput,
    DestroyedKey,
    KeyringError,
    KeyringExists,
    KeyringLocked,
    KeyringMissing,
    MissingKey,
    RevokedKey,
    StorageError,
    UsageError,
    WrongMaster,
)
from modeling.encryption.primitives import fresh_message_key
from tests.fixtures.keyrings import CHEAP, SUBJECT, opens, seal_pixels


def _states(keyring: Keyring) -> list[tuple[int, str]]:
    return [(info.generation, info.state) for info in keyring_admin.list_keys(keyring)]


def test_files_of_a_keyring_are_private_and_keys_are_stored(
    path: Path, master: KeyFile, keyring: Keyring
) -> None:
    for secret in (path, master.path):
        assert secret.stat().st_mode & 0o777 == 0o600
    assert len(master.path.read_bytes()) == 32
    sealed = seal_pixels(keyring)
    keyring.close()
    with Keyring.open(path, master) as again:
        assert opens(again, sealed)
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
    old = seal_pixels(keyring)
    keyring_admin.rotate(keyring, SUBJECT)
    new = seal_pixels(keyring)
    assert _states(keyring) == [(1, "retired"), (2, "active")]
    assert opens(keyring, old)
    assert opens(keyring, new)


def test_revoked_keys_neither_open_nor_seal_until_restored(keyring: Keyring) -> None:
    sealed = seal_pixels(keyring)
    keyring_admin.rotate(keyring, SUBJECT)
    assert keyring_admin.revoke(keyring, SUBJECT) == 2
    for use in (lambda: keyring.opening_key(sealed.chunk), lambda: keyring.sealing_key(SUBJECT)):
        with pytest.raises(RevokedKey, match="--undo"):
            use()
    keyring.ensure([SUBJECT])  # skips it
    assert keyring_admin.restore(keyring, SUBJECT) == 2
    assert _states(keyring) == [(1, "retired"), (2, "active")]
    assert opens(keyring, sealed)


def test_revoke_and_its_undo_can_be_repeated(keyring: Keyring) -> None:
    seal_pixels(keyring)
    for act, count in (
        (keyring_admin.restore, 0),
        (keyring_admin.revoke, 1),
        (keyring_admin.revoke, 0),
        (keyring_admin.restore, 1),
        (keyring_admin.restore, 0),
    ):
        assert act(keyring, SUBJECT) == count


def test_destroy_erases_key_and_label_from_the_file(path: Path, keyring: Keyring) -> None:
    sealed = seal_pixels(keyring)
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
    assert opens(keyring, seal_pixels(keyring))


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
    sealed, name = seal_pixels(keyring), keyring.file_name("market", "a/b.jpg")
    keyring_admin.destroy(keyring, _other(keyring))
    new = Passphrase("a new passphrase", CHEAP)
    keyring_admin.rekey(keyring, new)
    assert opens(keyring, sealed)
    keyring.close()
    with pytest.raises(WrongMaster):
        Keyring.open(path, master)
    with Keyring.open(path, new) as again:
        assert opens(again, sealed)
        assert again.file_name("market", "a/b.jpg") == name
        assert again.head.epoch == 1
        with pytest.raises(UsageError, match="exists already"):
            keyring_admin.rekey(again, master)


def _other(keyring: Keyring) -> str:
    seal_pixels(keyring, "market/test/9")
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
    sealed = seal_pixels(keyring)
    with Keyring.open(path, master) as other:
        assert opens(other, sealed)
        keyring_admin.revoke(keyring, SUBJECT)
        with pytest.raises(RevokedKey):
            other.opening_key(sealed.chunk)


def test_backup_is_a_working_keyring(path: Path, master: KeyFile, keyring: Keyring) -> None:
    sealed, target = seal_pixels(keyring), path.with_name("copy.db")
    assert keyring_admin.backup(keyring, target, master) == 1
    assert target.stat().st_mode & 0o777 == 0o600
    with Keyring.open(target, master) as copy:
        assert opens(copy, sealed)
    with pytest.raises(KeyringExists, match="never overwrites"):
        keyring_admin.backup(keyring, target, master)


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


def _race(job: Callable[[Path, int], str], path: Path, count: int = 8) -> list[str]:
    # Not "fork": a thread of the parent, such as TensorBoard's, may close a connection of SQLite at
    # that moment. The child would wait for its lock forever.
    context = multiprocessing.get_context("forkserver")
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
