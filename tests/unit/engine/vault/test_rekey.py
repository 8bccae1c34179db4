"""A failed rekey leaves no new file; a killed rekey is completed by the same command."""

from __future__ import annotations

import signal
import sqlite3
from pathlib import Path

import pytest

from engine.vault import keyring_admin
from engine.vault import master as new_master
from engine.vault.audit_reader import AuditLog, commands
from engine.vault.keyring import Keyring
from engine.vault.keyring_store import KeyringStore
from engine.vault.master import KeyFile, NewMasterFile, Passphrase, WrapCommand, mark_of
from modeling.encryption.ised_errors import KeyringLocked, StorageError
from tests.fixtures.keyrings import CHEAP, Scene, after, fail, killed
from tools import keyring as tool


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.mark.parametrize("error", [OSError(5, "I/O"), StorageError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["make", "put_row", "_put_head"])
def test_a_failure_leaves_no_new_file(
    scene: Scene, place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"make": NewMasterFile, "put_row": KeyringStore, "_put_head": Keyring}[place]
    before = scene.files()
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, after(getattr(owner, place), fail(error)))
        with Keyring.open(scene.path, scene.old) as keyring, pytest.raises(type(error)):
            keyring_admin.rekey(keyring, scene.new)
    assert scene.files() == before
    scene.check_under(scene.old, scene.new)
    assert tool.main(scene.command) == 0
    scene.check_rekeyed()


@pytest.mark.parametrize("place", ["put_row", "_put_head"])
def test_a_failure_is_in_the_audit_log(
    scene: Scene, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"put_row": KeyringStore, "_put_head": Keyring}[place]

    def full() -> None:
        if not scene.new.path.exists():  # of the audit entry before the command
            return
        patch.undo()
        raise StorageError("full")

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, after(getattr(owner, place), full))
        assert tool.main(scene.command) == 3
    with Keyring.open(scene.path, scene.old) as keyring:
        (command,) = commands(AuditLog(keyring))
    assert (command.command, command.result) == ("keyring rekey", "StorageError")


def test_a_full_disk_leaves_no_new_file(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SQLite fails at the commit, the last step; only the audit entry before it is written."""
    execute_of = sqlite3.connect

    class Full(sqlite3.Connection):
        def execute(self, text: str, *rest: object) -> sqlite3.Cursor:  # type: ignore[override]
            if text == "COMMIT" and self.total_changes > 1:
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


def test_a_key_file_that_cannot_be_written_leaves_no_new_file(
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


def test_a_locked_keyring_leaves_no_new_file(scene: Scene) -> None:
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


@pytest.mark.parametrize(
    "master", [Passphrase("correct horse", CHEAP), WrapCommand("unwrap", "wrap")]
)
def test_the_keyring_is_not_held_while_a_new_master_is_made(
    scene: Scene, master: Passphrase | WrapCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An external command may take a minute; other processes wait 20 s."""
    uses = []

    def slow(_: object) -> tuple[str, bytes, bytes]:
        with Keyring.open(scene.path, scene.old, busy_timeout_ms=0) as other:
            other.ensure(["meanwhile"])
        uses.append(1)
        return "", b"wrapped", bytes(32)

    monkeypatch.setattr(type(master), "new_key", slow)
    with Keyring.open(scene.path, scene.old) as keyring:
        keyring_admin.rekey(keyring, master)
        assert keyring.active_row("meanwhile") is not None
    assert uses == [1]


def test_an_error_after_the_commit_keeps_the_new_master(
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


def test_the_new_master_is_kept_if_the_keyring_cannot_be_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which master is in force is unknown then, so no key may be deleted."""

    def broken(self: KeyringStore) -> object:
        raise StorageError("I/O error")

    def fail() -> None:
        monkeypatch.setattr(KeyringStore, "head", broken)
        raise StorageError("I/O error")

    monkeypatch.setattr(Keyring, "_put_head", after(Keyring._put_head, fail))
    with Keyring.open(scene.path, scene.old) as keyring, pytest.raises(StorageError):
        keyring_admin.rekey(keyring, scene.new)
    assert scene.new.path.exists()
    assert mark_of(scene.new.path).exists()
    monkeypatch.undo()
    assert tool.main(scene.command) == 0
    scene.check_rekeyed()


# ---- kill -9 ------------------------------------------------------------------------------------


KILLS = {
    "after the mark": (new_master, "write_new_private", 1),
    "after the key file": (new_master, "write_new_private", 2),
    "after a row": (KeyringStore, "put_row", 1),
    "before the commit": (Keyring, "_put_head", 2),
}


@pytest.mark.parametrize("place", KILLS)
def test_the_same_command_resumes_after_a_kill(scene: Scene, place: str) -> None:
    owner, name, calls = KILLS[place]
    assert killed(scene, owner, name, calls) == -signal.SIGKILL  # type: ignore[arg-type]
    scene.check_under(scene.old, scene.new)
    assert tool.main(scene.command) == 0
    scene.check_rekeyed()
    assert tool.main(scene.command) == 4  # completed: the old master is a wrong one
    scene.check_rekeyed()


@pytest.mark.parametrize("given", ["old.key", "of another keyring.key"])
def test_a_kill_after_the_commit(
    scene: Scene, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The former master is unknown then, so the user is not advised to destroy the given one."""
    assert killed(scene, new_master, "is_claimed", 1) == -signal.SIGKILL  # type: ignore[arg-type]
    scene.check_under(scene.new, scene.old)
    assert mark_of(scene.new.path).exists()
    other = KeyFile(scene.path.with_name(given))
    other.create_if_missing()
    assert tool.main([part.replace("old.key", given) for part in scene.command]) == 0
    output = capsys.readouterr().out
    assert "new.key is in force already" in output
    assert "not known whether the given master is the former one" in output
    if other != scene.old:
        other.path.unlink()
    scene.check_rekeyed()
