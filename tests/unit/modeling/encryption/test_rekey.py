"""A rekey that fails leaves nothing new; one that is killed leaves what the same command ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from modeling.encryption import keyring_admin, new_master, secret_files
from modeling.encryption.errors import (
    KeyringError,
    KeyringLocked,
    StorageError,
    UsageError,
    WrongMaster,
)
from modeling.encryption.keyring import Keyring
from modeling.encryption.keyring_store import KeyringStore
from modeling.encryption.keyring_table import KeyTable
from modeling.encryption.master import KeyFile, Passphrase
from modeling.encryption.new_master import NewMasterFile, claim_of, mark_of
from modeling.encryption.secret_files import write_new_private
from tools import keyring as tool

SUBJECTS = ("set/1", "set/2")


class Scene:
    """A keyring of two keys under a key file, to be rekeyed to `new`."""

    def __init__(self, root: Path) -> None:
        self.path = root / "keys.db"
        self.old, self.new = KeyFile(root / "old.key"), KeyFile(root / "new.key")
        with Keyring.create(self.path, self.old) as keyring:
            self.keys = {name: keyring.sealing_key(name).key for name in SUBJECTS}

    @property
    def command(self) -> list[str]:
        keys = ["--keyring", str(self.path), "--master", str(self.old.path)]
        return [*keys, "rekey", "--new-master", str(self.new.path)]

    def files(self) -> set[str]:
        return {path.name for path in self.path.parent.iterdir()}

    def check_under(self, master: KeyFile, other: KeyFile) -> None:
        """Check that a master opens every key, and that the other one does not."""
        with Keyring.open(self.path, master) as keyring:
            assert {name: keyring.sealing_key(name).key for name in SUBJECTS} == self.keys
        with pytest.raises(KeyringError):
            Keyring.open(self.path, other)

    def check_rekeyed(self) -> None:
        self.check_under(self.new, self.old)
        assert self.files() == {"keys.db", "old.key", "new.key"}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def _after(function: Callable[..., object], act: Callable[[], None]) -> Callable[..., object]:
    """Return a function that acts when it has done its work."""

    def changed(*args: object, **options: object) -> object:
        found = function(*args, **options)
        act()
        return found

    return changed


def _fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("error", [OSError(5, "I/O"), StorageError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["make", "put_row", "_put_head"])
def test_a_failure_leaves_nothing_new(
    scene: Scene, place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"make": NewMasterFile, "put_row": KeyringStore, "_put_head": KeyTable}[place]
    before = scene.files()
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, _after(getattr(owner, place), _fail(error)))
        with Keyring.open(scene.path, scene.old) as keyring, pytest.raises(type(error)):
            keyring_admin.rekey(keyring, scene.new)
    assert scene.files() == before
    scene.check_under(scene.old, scene.new)
    assert tool.main(scene.command) == 0
    scene.check_rekeyed()


def test_a_full_disk_leaves_nothing_new(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLite itself fails at the commit, the last moment."""
    execute_of = sqlite3.connect

    class Full(sqlite3.Connection):
        def execute(self, text: str, *rest: object) -> sqlite3.Cursor:  # type: ignore[override]
            if text == "COMMIT" and self.total_changes:
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(text, *rest)  # type: ignore[arg-type]

    def connect(*args: object, **options: object) -> sqlite3.Connection:
        return execute_of(*args, factory=Full, **options)  # type: ignore[call-overload]

    before = scene.files()
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect)
        assert tool.main(scene.command) == 3
    assert "disk is full" in capsys.readouterr().err
    assert scene.files() == before
    scene.check_under(scene.old, scene.new)


def test_a_key_file_that_cannot_be_written_leaves_nothing_new(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, before = new_master.write_new_private, scene.files()

    def full(path: Path, content: bytes) -> None:
        if path == scene.new.path:
            raise StorageError("cannot write: No space left on device")
        written(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(new_master, "write_new_private", full)
        assert tool.main(scene.command) == 3
    assert scene.files() == before
    scene.check_under(scene.old, scene.new)


def test_a_locked_keyring_leaves_nothing_new(scene: Scene) -> None:
    before = scene.files()
    with (
        Keyring.open(scene.path, scene.old) as other,
        Keyring.open(scene.path, scene.old, busy_timeout_ms=50) as keyring,
        other.store.transaction(write=True),
        pytest.raises(KeyringLocked),
    ):
        keyring_admin.rekey(keyring, scene.new)
    assert scene.files() == before
    scene.check_under(scene.old, scene.new)


def test_an_error_after_the_commit_keeps_the_key_that_is_in_force(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = KeyringStore.transaction

    def interrupted(self: KeyringStore, *, write: bool) -> object:
        manager = commit(self, write=write)
        leave = manager.__exit__

        def leaving(*error: object) -> object:
            leave(*error)  # type: ignore[arg-type]
            if write and error == (None, None, None):
                patch.undo()
                raise KeyboardInterrupt
            return None

        class Manager:
            def __enter__(self) -> None:
                manager.__enter__()

            def __exit__(self, *error: object) -> object:
                return leaving(*error)

        return Manager()

    with monkeypatch.context() as patch:
        patch.setattr(KeyringStore, "transaction", interrupted)
        with Keyring.open(scene.path, scene.old) as keyring, pytest.raises(KeyboardInterrupt):
            keyring_admin.rekey(keyring, scene.new)
    scene.check_under(scene.new, scene.old)
    assert tool.main(scene.command) == 0
    scene.check_rekeyed()


def test_what_cannot_be_looked_at_stays(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody can say which master is in force, no key is removed."""

    def broken(self: KeyringStore) -> object:
        raise StorageError("I/O error")

    def fail() -> None:
        monkeypatch.setattr(KeyringStore, "head", broken)
        raise StorageError("I/O error")

    monkeypatch.setattr(KeyTable, "_put_head", _after(KeyTable._put_head, fail))
    with Keyring.open(scene.path, scene.old) as keyring, pytest.raises(StorageError):
        keyring_admin.rekey(keyring, scene.new)
    assert scene.new.path.exists()
    assert mark_of(scene.new.path).exists()
    monkeypatch.undo()
    assert tool.main(scene.command) == 0
    scene.check_rekeyed()


# ---- kill -9 ------------------------------------------------------------------------------------


def _killed(scene: Scene, owner: type, name: str, calls: int) -> int:
    """Rekey in a process that kills itself after so many calls of a function; returns its code."""

    def child() -> None:
        count = 0

        def act() -> None:
            nonlocal count
            count += 1
            if count == calls:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, _after(getattr(owner, name), act))
        with suppress(SystemExit):
            tool.main(scene.command)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode or 0


KILLS = {
    "after the mark": (new_master, "write_new_private", 1),
    "after the key file": (new_master, "write_new_private", 2),
    "after a row": (KeyringStore, "put_row", 1),
    "before the commit": (KeyTable, "_put_head", 1),
}


@pytest.mark.parametrize("place", KILLS)
def test_the_same_command_goes_on_after_a_kill(scene: Scene, place: str) -> None:
    owner, name, calls = KILLS[place]
    assert _killed(scene, owner, name, calls) == -signal.SIGKILL  # type: ignore[arg-type]
    scene.check_under(scene.old, scene.new)
    assert tool.main(scene.command) == 0
    scene.check_rekeyed()
    assert tool.main(scene.command) == 4  # done already, and nothing left that says so
    scene.check_rekeyed()


@pytest.mark.parametrize("given", ["old.key", "of another keyring.key"])
def test_a_kill_after_the_commit(
    scene: Scene, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was the master cannot be told any more: nobody is told to destroy what he gave."""
    assert _killed(scene, new_master, "is_claimed", 1) == -signal.SIGKILL  # type: ignore[arg-type]
    scene.check_under(scene.new, scene.old)
    assert mark_of(scene.new.path).exists()
    other = KeyFile(scene.path.with_name(given))
    other.create_if_missing()
    assert tool.main([part.replace("old.key", given) for part in scene.command]) == 0
    told = capsys.readouterr().out
    assert "new.key is in force already" in told
    assert "not known whether what was given is the former master" in told
    if other != scene.old:
        other.path.unlink()
    scene.check_rekeyed()


# ---- what exists is nobody's to take ------------------------------------------------------------


def test_a_key_file_that_is_no_leftover_is_refused_and_kept(scene: Scene, tmp_path: Path) -> None:
    scene.new.create_if_missing()
    content = scene.new.path.read_bytes()
    assert tool.main(scene.command) == 2
    write_new_private(mark_of(scene.new.path), claim_of(content, bytes(16), 0))  # another keyring's
    assert tool.main(scene.command) == 2
    assert scene.new.path.read_bytes() == content
    scene.check_under(scene.old, scene.new)


def test_a_stale_mark_makes_no_key_of_another_keyring_acceptable(scene: Scene) -> None:
    """Two keyrings under one key would be lost together, and destroyed together."""
    assert _killed(scene, new_master, "write_new_private", 1) == -signal.SIGKILL  # type: ignore[arg-type]
    assert mark_of(scene.new.path).exists()
    assert not scene.new.path.exists()
    other = scene.path.with_name("other.db")
    assert tool.main(["--keyring", str(other), "--master", str(scene.new.path), "init"]) == 0
    assert tool.main(scene.command) == 2
    scene.check_under(scene.old, scene.new)
    Keyring.open(other, scene.new).close()


@pytest.mark.parametrize("error", [OSError(5, "I/O"), KeyboardInterrupt()])
@pytest.mark.parametrize("calls", [1, 2])
def test_an_error_after_a_name_was_linked_leaves_neither(
    scene: Scene, error: BaseException, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, synced = scene.files(), secret_files.sync_folder
    left = [calls]

    def failing(folder: Path) -> None:
        synced(folder)
        left[0] -= 1
        if left[0] == 0:
            raise error

    monkeypatch.setattr(secret_files, "sync_folder", failing)
    assert tool.main(scene.command) == (130 if isinstance(error, KeyboardInterrupt) else 3)
    assert left[0] == 0
    assert scene.files() == before
    scene.check_under(scene.old, scene.new)


def test_who_is_slower_leaves_the_winners_file_and_no_mark(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, before = new_master.write_new_private, scene.files()

    def beaten(path: Path, content: bytes) -> None:
        if path == scene.new.path:
            written(path, b"k" * 32)
        written(path, content)

    monkeypatch.setattr(new_master, "write_new_private", beaten)
    assert tool.main(scene.command) == 2
    assert scene.files() == {*before, "new.key"}
    assert scene.new.path.read_bytes() == b"k" * 32
    scene.check_under(scene.old, scene.new)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_mark_that_is_no_private_file_counts_for_nothing(scene: Scene, kind: str) -> None:
    scene.new.create_if_missing()
    mark = mark_of(scene.new.path)
    if kind == "pipe":
        os.mkfifo(mark, 0o600)  # nobody writes: a plain read would wait for ever
    else:
        with Keyring.open(scene.path, scene.old) as keyring:
            claim = claim_of(scene.new.path.read_bytes(), keyring.head.keyring_id, 0)
        write_new_private(mark.with_name("claim"), claim)
        mark.symlink_to("claim")
    assert tool.main(scene.command) == 2
    scene.check_under(scene.old, scene.new)


def test_a_mark_of_an_earlier_epoch_does_not_open_the_way_back(scene: Scene) -> None:
    """A former master would open what `destroy` left in old copies; it never becomes one again."""
    with Keyring.open(scene.path, scene.old) as keyring:
        head = keyring.head
        keyring_admin.rekey(keyring, scene.new)
    claim = claim_of(scene.old.path.read_bytes(), head.keyring_id, head.epoch)
    write_new_private(mark_of(scene.old.path), claim)
    with (
        Keyring.open(scene.path, scene.new) as keyring,
        pytest.raises(UsageError, match="exists already"),
    ):
        keyring_admin.rekey(keyring, scene.old)


@pytest.mark.parametrize("marked", [None, "another keyring", "another epoch"])
def test_the_master_of_another_keyring_is_not_called_a_former_one(
    scene: Scene, marked: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who confuses two keyrings must not be told to destroy the other one's only key."""
    other = scene.path.with_name("b.db")
    with Keyring.create(other, scene.new) as keyring:
        head = keyring.head
    mark = mark_of(scene.new.path)
    if marked is not None:
        keyring_id = bytes(16) if marked == "another keyring" else head.keyring_id
        epoch = head.epoch if marked == "another epoch" else head.epoch - 1
        write_new_private(mark, claim_of(scene.new.path.read_bytes(), keyring_id, epoch))
    command = [part.replace("keys.db", "b.db") for part in scene.command]
    assert tool.main(command) == 4
    told = capsys.readouterr()
    assert "WrongMaster: " in told.err
    assert "destroy" not in told.out + told.err
    assert mark.exists() == (marked is not None)


def test_another_wrong_master_is_told_as_before(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    KeyFile(scene.path.with_name("wrong.key")).create_if_missing()
    command = [part.replace("old.key", "wrong.key") for part in scene.command]
    assert tool.main(command) == 4
    assert "WrongMaster: " in capsys.readouterr().err
    with pytest.raises(WrongMaster), Keyring.open(scene.path, Passphrase("a passphrase")):
        pass
    assert not scene.new.path.exists()
