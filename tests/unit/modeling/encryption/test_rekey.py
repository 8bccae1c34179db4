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

from modeling.encryption import keyring_admin, new_master
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
from modeling.encryption.new_master import NewMasterFile, mark_of
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
    assert tool.main(scene.command) == 0  # done already
    scene.check_rekeyed()


def test_a_kill_after_the_commit(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert _killed(scene, keyring_admin, "mark_of", 1) == -signal.SIGKILL  # type: ignore[arg-type]
    scene.check_under(scene.new, scene.old)
    assert mark_of(scene.new.path).exists()
    assert tool.main(scene.command) == 0
    assert "in force already" in capsys.readouterr().out
    scene.check_rekeyed()


# ---- what exists is nobody's to take ------------------------------------------------------------


def test_a_key_file_that_is_no_leftover_is_refused_and_kept(scene: Scene, tmp_path: Path) -> None:
    scene.new.create_if_missing()
    content = scene.new.path.read_bytes()
    assert tool.main(scene.command) == 2
    mark_of(scene.new.path).write_bytes(b"of another keyring 0\n")
    assert tool.main(scene.command) == 2
    assert scene.new.path.read_bytes() == content
    scene.check_under(scene.old, scene.new)


def test_a_mark_of_an_earlier_epoch_does_not_open_the_way_back(scene: Scene) -> None:
    """A former master would open what `destroy` left in old copies; it never becomes one again."""
    with Keyring.open(scene.path, scene.old) as keyring:
        claim = NewMasterFile(scene.new.path, keyring.head)._claim
        keyring_admin.rekey(keyring, scene.new)
    mark_of(scene.old.path).write_bytes(claim)
    with (
        Keyring.open(scene.path, scene.new) as keyring,
        pytest.raises(UsageError, match="exists already"),
    ):
        keyring_admin.rekey(keyring, scene.old)


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
