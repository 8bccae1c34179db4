"""The audit log survives a full disk, a kill at any moment, and two writers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.vault import audit, audit_reader, keyring_admin
from engine.vault.audit import recorded
from engine.vault.audit_reader import AuditLog
from engine.vault.keyring import Keyring
from engine.vault.keyring_store import KeyringStore
from modeling.encryption.ised_errors import KeyringExists, RevokedKey, StorageError
from tests.fixtures.keyrings import LoggedKeyring
from utils import files


@pytest.mark.parametrize("end", ["error", "kill"])
def test_a_backup_that_failed_after_its_log_was_copied_is_repeated(
    filled: LoggedKeyring, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has its name before the keyring, and alone it would block the same command."""
    target, copied = filled.path.with_name("copy.db"), filled.path.with_name("copy.db.audit")

    def failing(temporary: Path, path: Path) -> None:
        if path == target:
            assert copied.exists()
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        os.link(temporary, path)

    def run() -> None:
        with filled.open() as keyring:
            keyring_admin.backup(keyring, target, filled.master)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_link", failing)
        if end == "error":
            with pytest.raises(StorageError, match="No space left"):
                run()
        else:
            process = multiprocessing.get_context("fork").Process(target=run)
            process.start()
            process.join()
    assert copied.exists() == (end == "kill")
    filled.run("four")
    run()
    copy = Keyring.open(target, filled.master)
    assert AuditLog(copy).problems == []
    copied.write_bytes(b"another log\n")  # of a former keyring, which is never overwritten
    target.unlink()
    with pytest.raises(KeyringExists, match="or its audit log"):
        run()
    assert copied.read_bytes() == b"another log\n"


@pytest.mark.parametrize("written", [0, 1, 100])
def test_a_full_disk_fails_the_command_and_leaves_the_log(
    filled: LoggedKeyring, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, before = os.write, filled.log.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", _limited(write, written))
        with pytest.raises(StorageError, match="No space left on device"):
            filled.run("four")
    assert filled.log.read_bytes() == before
    filled.run("five")
    assert filled.read().problems == []
    assert [command.command for command in filled.commands][-1] == "five"


def _limited(write: Callable[[int, bytes], int], room: int) -> Callable[[int, bytes], int]:
    """Return an `os.write` for a disk with room for some bytes."""
    left = [room]

    def limited(descriptor: int, content: bytes) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        count = write(descriptor, content[: left[0]])
        left[0] -= count
        return count

    return limited


def test_an_entry_that_is_missing_at_the_end_fails_the_command(
    filled: LoggedKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(StorageError, match="`open` ended, but its audit entry is missing"),
        filled.open() as keyring,
        recorded(keyring, "open"),
    ):
        monkeypatch.setattr(os, "write", _limited(os.write, 0))
    monkeypatch.undo()
    filled.run("next")
    assert filled.read().problems == []
    results = {command.command: command.result for command in filled.commands}
    assert (results["open"], results["next"]) == (None, "done")


def test_a_lock_at_the_end_of_a_command_does_not_advise_to_repeat_it(filled: LoggedKeyring) -> None:
    """A second `rotate`, for example, would make another key."""
    other = sqlite3.connect(filled.path, isolation_level=None)
    with (
        pytest.raises(StorageError, match="`keyring rotate` ended, but its audit entry is missing"),
        Keyring.open(filled.path, filled.master, busy_timeout_ms=1) as keyring,
        recorded(keyring, "keyring rotate"),
    ):
        other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_keyring_that_cannot_be_written_is_refused_with_advice(
    filled: LoggedKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="copy keyring and log to a folder that you may write"):
        filled.run("four")


def test_an_entry_of_a_failed_commit_is_counted_by_the_next_command(
    filled: LoggedKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens again and again, but the log never has more than one uncounted entry."""
    connect_of = sqlite3.connect

    class Full(sqlite3.Connection):
        def execute(self, text: str, *rest: object) -> sqlite3.Cursor:  # type: ignore[override]
            if text == "COMMIT" and self.total_changes:
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(text, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **k: connect_of(*a, factory=Full, **k))
        for _ in range(3):
            with pytest.raises(StorageError, match="disk is full"):
                filled.run("failed")
    log = filled.read()
    assert log.problems == []
    assert log.notes == [
        "entry 7 is not counted yet: its command is running or was killed, and the next one "
        "counts it"
    ]
    filled.run("next")
    assert (filled.read().problems, len(filled.lines())) == ([], 9)


def test_an_incomplete_line_is_removed_by_the_next_command(filled: LoggedKeyring) -> None:
    whole = filled.log.read_bytes()
    filled.log.write_bytes(whole + filled.lines()[-1][:70])
    log = filled.read()
    assert log.problems == []
    assert log.notes[0].startswith("an incomplete line follows")
    filled.run("four")
    assert filled.read().problems == []
    assert filled.read().notes == []
    assert filled.log.read_bytes().startswith(whole)


def _run_forever(logged: LoggedKeyring) -> None:
    while True:
        logged.run("child")


def _check_after_kills(logged: LoggedKeyring, kills: int, seed: int) -> None:
    """Kill a process that writes entries at random moments; the log verifies each time."""
    delays, context = random.Random(seed), multiprocessing.get_context("fork")
    for _ in range(kills):
        process, size = context.Process(target=_run_forever, args=(logged,)), logged.size()
        process.start()
        while logged.size() == size:  # on a busy machine it takes long to start
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.1))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert logged.read().problems == []
        logged.run("after the kill")
        log = logged.read()
        assert log.problems == []
        assert all("was not counted until" in note for note in log.notes)
    names = {command.command for command in logged.commands}
    assert names == {"child", "after the kill"}


def test_kill_at_random_moments(logged: LoggedKeyring) -> None:
    _check_after_kills(logged, kills=3, seed=1)


@pytest.mark.slow
def test_kill_at_40_random_moments(logged: LoggedKeyring) -> None:
    _check_after_kills(logged, kills=40, seed=2)


@pytest.mark.parametrize("step", ["after the line", "before the commit"])
def test_kill_between_line_and_state(
    filled: LoggedKeyring, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {
        "after the line": (audit, "_write"),
        "before the commit": (Keyring, "_put_head"),
    }[step]
    function = getattr(owner, name)

    def killed(*arguments: object) -> None:
        function(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(owner, name, killed)
    process = multiprocessing.get_context("fork").Process(target=filled.run, args=("killed",))
    process.start()
    process.join()
    monkeypatch.undo()
    assert process.exitcode == -signal.SIGKILL
    log = filled.read()
    assert (log.problems, log.count) == ([], 6)
    assert log.notes[0].startswith("entry 7 is not counted yet")
    filled.run("next")
    log = filled.read()
    assert (log.problems, len(log.notes)) == ([], 1)
    assert log.notes[0].startswith("entry 7 was not counted until entry 8")
    results = {command.command: command.result for command in filled.commands}
    assert (results["killed"], results["next"]) == (None, "done")


def test_a_copy_of_the_keyring_made_during_a_command_leaves_a_note(logged: LoggedKeyring) -> None:
    """The log states that the key was destroyed, so the note is the only trace."""
    copy = logged.path.with_name("copy.db")
    with logged.open() as keyring:
        keyring.ensure(["set/1"])
        with recorded(keyring, "keyring destroy"):
            shutil.copy2(logged.path, copy)
            keyring_admin.destroy(keyring, "set/1")
    copy.rename(logged.path)
    logged.run("next")
    log = logged.read()
    assert log.problems == []
    assert log.notes == [
        "entry 2 was not counted until entry 3: its command was killed, or the keyring was "
        "replaced by a copy made while it ran"
    ]


def test_two_writers_write_one_chain(logged: LoggedKeyring) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=logged.run, args=[f"writer {number}"] * 6) for number in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    log = logged.read()
    assert (log.problems, log.notes, log.count) == ([], [], 24)
    assert {command.result for command in logged.commands} == {"done"}


def test_a_reader_does_not_see_later_entries(filled: LoggedKeyring) -> None:
    with filled.open() as keyring:
        log = AuditLog(keyring)
        filled.run("later", "much later")
        assert len(list(log)) == 6
    assert log.problems == []


def test_the_cost_of_an_entry_does_not_grow_with_the_log(
    filled: LoggedKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry reads a bounded part of the log, and no line is authenticated again."""
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(audit, "_MAX_LINE", 500)
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args[1]) or pread(*args))
    filled.run(*["many"] * 10)
    assert max(read) <= 1500
    assert filled.log.stat().st_size > 4500
    monkeypatch.setattr(audit_reader, "line_hash", audit.line_hash)
    assert filled.read().problems == []


def test_lines_are_json(filled: LoggedKeyring) -> None:
    for number, line in enumerate(filled.lines(), 1):
        assert json.loads(line[65:])["entry"] == number


def test_an_entry_of_another_process_reads_no_row_again(
    logged: LoggedKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged.open() as keyring:
        keyring.ensure(["set/1"])
        logged.run("other")
        with monkeypatch.context() as patch:
            patch.setattr(KeyringStore, "rows", lambda _: pytest.fail("rows were read"))
            assert keyring.audit_state()[0] == 2
            keyring.sealing_key("set/1")
        with logged.open() as other:
            keyring_admin.revoke(other, "set/1")
        with pytest.raises(RevokedKey):
            keyring.sealing_key("set/1")
