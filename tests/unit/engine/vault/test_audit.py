"""The audit log names every change of its entries, and survives a kill at any moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.vault import audit, audit_reader, keyring_admin
from engine.vault.audit import MAX_KEYS, copy_log, log_path, recorded, restart
from engine.vault.audit_reader import AuditLog, Command, commands
from engine.vault.keyring import Keyring
from engine.vault.keyring_store import KeyringStore
from engine.vault.master import KeyFile
from modeling.encryption.ised_errors import (
    InsecurePermissions,
    KeyringCorrupt,
    KeyringExists,
    MissingKey,
    RevokedKey,
    StorageError,
)
from tests.fixtures.keyrings import to_format


class Scene:
    """A keyring with an audit log."""

    def __init__(self, root: Path) -> None:
        self.path, self.master = root / "keys.db", KeyFile(root / "m.key")
        Keyring.create(self.path, self.master).close()
        self.log = log_path(self.path)

    def open(self) -> Keyring:
        return Keyring.open(self.path, self.master)

    def run(self, *names: str) -> None:
        with self.open() as keyring:
            for name in names:
                with recorded(keyring, name):
                    pass

    def read(self) -> AuditLog:
        """Return the log after it was read to its end."""
        with self.open() as keyring:
            log = AuditLog(keyring)
            self.commands = list(commands(log))
        return log

    def size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def lines(self) -> list[bytes]:
        return self.log.read_bytes().splitlines(keepends=True)

    def problems(self, *lines: bytes) -> list[str]:
        """Return what is wrong with other lines in place of the log."""
        self.log.write_bytes(b"".join(lines))
        return self.read().problems


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


@pytest.fixture
def filled(scene: Scene) -> Iterator[Scene]:
    """Return a scene with six entries, which is the same at the end of the test."""
    scene.run("one", "two", "three")
    return scene


def test_entries_contain_who_what_and_when(scene: Scene) -> None:
    with scene.open() as keyring, recorded(keyring, "protect protect"):
        key = keyring.sealing_key("set/Jane Doe")
        keyring.sealing_key("set/Jane Doe")
        keyring.use.failed = 3
    log = scene.read()
    assert (log.problems, log.notes, log.count) == ([], [], 2)
    (command,) = scene.commands
    assert command == Command(
        entry=1,
        time=command.time,
        user=command.user,
        host=command.host,
        command="protect protect",
        login=command.login,
        result="done",
        files=2,
        failed=3,
        subjects=1,
        keys={key.key_id.hex(): 2},
    )
    assert abs(command.time.timestamp() - time.time()) < 60
    assert command.user
    assert scene.log.stat().st_mode & 0o777 == 0o600
    assert b"Jane" not in scene.log.read_bytes()


@pytest.mark.parametrize(
    ("error", "result"), [(MissingKey("x"), "MissingKey"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_failed_command_is_entered_with_its_error(
    scene: Scene, error: BaseException, result: str
) -> None:
    with pytest.raises(type(error)), scene.open() as keyring, recorded(keyring, "open"):
        raise error
    assert scene.read().problems == []
    assert [command.result for command in scene.commands] == [result]


def test_keys_that_were_written_are_entered(scene: Scene) -> None:
    with scene.open() as keyring:
        keyring.ensure(["set/1", "set/2"])
        (row,) = keyring.rows_of("set/1")
    with scene.open() as keyring, recorded(keyring, "keyring destroy"):
        keyring_admin.destroy(keyring, "set/1")
    scene.read()
    assert scene.commands[0].keys == {row.key_id.hex(): 0}
    assert scene.commands[0].concerns(row.key_id.hex()[:12])
    assert not scene.commands[0].concerns("00" * 16)


def test_an_entry_lists_a_bounded_number_of_keys(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_KEYS", 2)
    with scene.open() as keyring, recorded(keyring, "protect protect"):
        keyring.ensure([f"set/{number}" for number in range(5)])
    scene.read()
    (command,) = scene.commands
    assert (len(command.keys), command.more_keys, command.subjects) == (2, 3, 5)
    assert command.concerns("00" * 16)  # it may have used any key


def test_the_longest_entry_is_read_again(scene: Scene) -> None:
    with scene.open() as keyring, recorded(keyring, "protect protect"):
        keyring.use.keys |= {os.urandom(16) for _ in range(MAX_KEYS + 1)}
        keyring.use.files.update(dict.fromkeys(keyring.use.keys, 10**9))
    scene.run("next")
    assert scene.read().problems == []


def test_names_of_commands() -> None:
    command = Command(1, None, "", "", "keyring shares create")  # type: ignore[arg-type]
    for name, is_named in (("create", True), ("shares create", True), ("ate", False)):
        assert command.is_named(name) is is_named


def test_a_rekey_continues_the_log(filled: Scene) -> None:
    new = KeyFile(filled.path.with_name("new.key"))
    with filled.open() as keyring, recorded(keyring, "keyring rekey"):
        keyring_admin.rekey(keyring, new)
    filled.master = new
    filled.run("after")
    assert filled.read().problems == []
    assert [c.command for c in filled.commands][-2:] == ["keyring rekey", "after"]


def test_an_older_keyring_gets_a_log(scene: Scene) -> None:
    with scene.open() as keyring:
        to_format(2, keyring)
    assert scene.read().problems == []
    assert scene.commands == []
    scene.run("first")
    assert scene.read().problems == []
    assert [command.command for command in scene.commands] == ["first"]


# ---- changes of the log -------------------------------------------------------------------------


def _accepted_changes(scene: Scene, bits: Callable[[int], list[int]]) -> list[tuple[int, int]]:
    """Return the positions and bits of a log that can be changed without a problem."""
    content, accepted = scene.log.read_bytes(), []
    with scene.open() as keyring:
        number = len(list(AuditLog(keyring)))
        for place in range(len(content)):
            for bit in bits(place):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                scene.log.write_bytes(changed)
                log = AuditLog(keyring)
                if len(list(log)) == number or not log.problems:
                    accepted.append((place, bit))
    return accepted


def test_no_changed_byte_is_accepted(scene: Scene) -> None:
    scene.run("one")
    assert _accepted_changes(scene, lambda place: [place % 8]) == []


@pytest.mark.slow
def test_no_changed_bit_is_accepted(scene: Scene) -> None:
    scene.run("one", "two")
    assert _accepted_changes(scene, lambda _: list(range(8))) == []


def test_a_changed_entry_is_named(filled: Scene) -> None:
    lines = filled.lines()
    lines[2] = lines[2].replace(b'"two"', b'"owt"')
    assert filled.problems(*lines) == ["line 3: entry 3 was changed"]
    lines = [*lines[:5], lines[5].replace(b'"done"', b'"gone"')]
    assert filled.problems(*lines)[-1] == "line 6: entry 6 was changed"


def test_removed_entries_are_named(filled: Scene) -> None:
    one, two, three, four, five, six = filled.lines()
    assert filled.problems(two, three, four, five, six) == ["entry 1 is missing"]
    assert filled.problems(one, two, five, six) == ["entries 3 to 4 are missing"]
    assert filled.problems(two, four, five, six) == ["entry 1 is missing", "entry 3 is missing"]


def test_a_truncated_end_is_named(filled: Scene) -> None:
    lines = filled.lines()
    assert filled.problems(*lines[:5]) == ["entry 6 is missing at the end"]
    assert filled.problems(*lines[:2]) == ["entries 3 to 6 are missing at the end"]
    missing = "the log is missing or empty; the keyring counts 6 entries"
    assert filled.problems() == [missing]
    assert filled.problems(*lines[:5], lines[5][:-1]) == ["line 6: entry 6 was changed"]
    filled.log.unlink()
    assert filled.read().problems == [missing]


def test_reordered_and_repeated_entries_are_named(filled: Scene) -> None:
    one, two, three, four, five, six = filled.lines()
    assert filled.problems(one, three, two, four, five, six) == ["line 3: entry 2 is out of order"]
    assert filled.problems(one, two, three, four, six, five)[0] == (
        "line 6: entry 5 is out of order"
    )
    assert filled.problems(one, two, two, three, four, five, six) == [
        "line 3: entry 2 is there twice"
    ]


def test_added_lines_are_named(filled: Scene) -> None:
    lines = filled.lines()
    forged = b"0" * 64 + lines[0][64:]
    assert filled.problems(*lines[:3], forged, *lines[3:]) == [
        "line 4 is not authentic: changed or added"
    ]
    assert filled.problems(*lines, forged) == ["line 7 is not authentic: changed or added"]
    assert filled.problems(*lines, b"\n") == ["line 7 is not authentic: changed or added"]


def test_entries_of_another_keyring_are_named(filled: Scene, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Scene(tmp_path / "other")
    other.run("one", "two", "three")
    lines = filled.lines()
    assert filled.problems(*lines[:2], other.lines()[2], *lines[3:]) == [
        "line 3: entry 3 was changed"
    ]


def test_an_older_copy_of_the_keyring_is_detected(scene: Scene) -> None:
    scene.run("one")
    shutil.copy(scene.path, scene.path.with_name("copy"))
    scene.run("two")
    scene.path.write_bytes(scene.path.with_name("copy").read_bytes())
    assert scene.read().problems == [
        "the keyring counts 2 entries, the log has 4: the keyring was replaced by an older copy"
    ]
    with pytest.raises(KeyringCorrupt, match="audit --accept"):
        scene.run("three")


def test_an_entry_from_another_copy_of_the_keyring_is_detected(scene: Scene) -> None:
    """Both copies authenticate their entries with the same key."""
    scene.run("one")
    copies = [(path, path.read_bytes()) for path in (scene.path, scene.log)]
    scene.run("two")
    foreign = scene.lines()[2:]
    for path, content in copies:
        path.write_bytes(content)
    scene.run("three")
    lines = scene.lines()
    problems = scene.problems(*lines[:2], *foreign)
    assert problems == [
        "entry 4 is not the one that the keyring counts; the log is from another copy of the "
        "keyring"
    ]
    assert "does not continue the entry before it" in scene.problems(*lines[:3], foreign[1])[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines[:-1], lines[-1].replace(b"done", b"gone")],
        lambda lines: [*lines, b"0" * 64 + lines[-1][64:]],
        lambda lines: [lines[-1][:-1]],
        lambda lines: [],
    ],
)
def test_commands_refuse_a_log_that_does_not_match(
    filled: Scene, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    changed = b"".join(damage(filled.lines()))
    filled.log.write_bytes(changed)
    with pytest.raises(KeyringCorrupt, match="does not end with entry 6"):
        filled.run("four")
    assert filled.log.read_bytes() == changed
    filled.log.unlink()
    with pytest.raises(KeyringCorrupt, match="is missing, of which the keyring counts 6 entries"):
        filled.run("four")


def test_accepting_sets_the_log_aside_and_begins_a_marked_one(filled: Scene) -> None:
    filled.log.write_bytes(b"".join(filled.lines()[:4]))
    with filled.open() as keyring:
        kept = restart(keyring)
    assert kept is not None
    assert kept.read_bytes().count(b"\n") == 4
    filled.run("four")
    log = filled.read()
    assert (log.problems, log.count) == ([], 9)
    assert log.notes == ["begins with entry 7: the log before was set aside"]
    assert [command.command for command in filled.commands] == ["audit --accept", "four"]
    assert filled.problems(*filled.lines()[1:]) == ["entries 1 to 7 are missing"]
    filled.log.unlink()
    with filled.open() as keyring:
        assert restart(keyring) is None
    assert filled.read().problems == []


def test_a_log_that_others_can_read_is_refused(filled: Scene) -> None:
    filled.log.chmod(0o644)
    with pytest.raises(InsecurePermissions, match="chmod 600"):
        filled.run("four")
    filled.log.rename(filled.log.with_name("elsewhere"))
    filled.log.symlink_to("elsewhere")
    with pytest.raises(InsecurePermissions, match="symbolic link"):
        filled.run("four")


def test_a_new_keyring_does_not_continue_a_former_log(filled: Scene) -> None:
    filled.path.unlink()
    with pytest.raises(KeyringExists, match="keys.db.audit exists already"):
        Keyring.create(filled.path, filled.master)
    assert not filled.path.exists()


# ---- backup -------------------------------------------------------------------------------------


def test_a_backup_contains_the_log(filled: Scene, tmp_path: Path) -> None:
    copy = Scene.__new__(Scene)
    copy.path, copy.master, copy.log = (
        tmp_path / "copy.db",
        filled.master,
        tmp_path / "copy.db.audit",
    )
    with filled.open() as keyring, recorded(keyring, "keyring backup"):
        keyring_admin.backup(keyring, copy.path, filled.master)
    filled.run("four")
    assert copy.read().problems == []
    copy.run("five")
    assert copy.read().problems == []
    with filled.open() as keyring, pytest.raises(KeyringExists, match="never overwrites"):
        keyring_admin.backup(keyring, copy.path, filled.master)
    copy.path.unlink()
    with filled.open() as keyring, pytest.raises(KeyringExists, match="or its audit log"):
        keyring_admin.backup(keyring, copy.path, filled.master)
    assert not copy.path.exists()


def test_a_log_that_does_not_match_is_not_copied(filled: Scene, tmp_path: Path) -> None:
    with pytest.raises(KeyringCorrupt, match="audit --verify"):
        copy_log(filled.path, tmp_path / "copy.db", b"x" * 32)
    assert not (tmp_path / "copy.db.audit").exists()


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 1, 100])
def test_a_full_disk_fails_the_command_and_leaves_the_log(
    filled: Scene, written: int, monkeypatch: pytest.MonkeyPatch
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
    filled: Scene, monkeypatch: pytest.MonkeyPatch
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


def test_a_lock_at_the_end_of_a_command_does_not_advise_to_repeat_it(filled: Scene) -> None:
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
    filled: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="copy keyring and log to a folder that you may write"):
        filled.run("four")


def test_an_entry_of_a_failed_commit_is_counted_by_the_next_command(
    filled: Scene, monkeypatch: pytest.MonkeyPatch
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


def test_an_incomplete_line_is_removed_by_the_next_command(filled: Scene) -> None:
    whole = filled.log.read_bytes()
    filled.log.write_bytes(whole + filled.lines()[-1][:70])
    log = filled.read()
    assert log.problems == []
    assert log.notes[0].startswith("an incomplete line follows")
    filled.run("four")
    assert filled.read().problems == []
    assert filled.read().notes == []
    assert filled.log.read_bytes().startswith(whole)


def _run_forever(scene: Scene) -> None:
    while True:
        scene.run("child")


def _check_after_kills(scene: Scene, kills: int, seed: int) -> None:
    """Kill a process that writes entries at random moments; the log verifies each time."""
    delays, context = random.Random(seed), multiprocessing.get_context("fork")
    for _ in range(kills):
        process, size = context.Process(target=_run_forever, args=(scene,)), scene.size()
        process.start()
        while scene.size() == size:  # on a busy machine it takes long to start
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.1))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert scene.read().problems == []
        scene.run("after the kill")
        log = scene.read()
        assert log.problems == []
        assert all("was not counted until" in note for note in log.notes)
    names = {command.command for command in scene.commands}
    assert names == {"child", "after the kill"}


def test_kill_at_random_moments(scene: Scene) -> None:
    _check_after_kills(scene, kills=3, seed=1)


@pytest.mark.slow
def test_kill_at_40_random_moments(scene: Scene) -> None:
    _check_after_kills(scene, kills=40, seed=2)


@pytest.mark.parametrize("step", ["after the line", "before the commit"])
def test_kill_between_line_and_state(
    filled: Scene, step: str, monkeypatch: pytest.MonkeyPatch
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


def test_a_copy_of_the_keyring_made_during_a_command_leaves_a_note(scene: Scene) -> None:
    """The log states that the key was destroyed, so the note is the only trace."""
    copy = scene.path.with_name("copy.db")
    with scene.open() as keyring:
        keyring.ensure(["set/1"])
        with recorded(keyring, "keyring destroy"):
            shutil.copy2(scene.path, copy)
            keyring_admin.destroy(keyring, "set/1")
    copy.rename(scene.path)
    scene.run("next")
    log = scene.read()
    assert log.problems == []
    assert log.notes == [
        "entry 2 was not counted until entry 3: its command was killed, or the keyring was "
        "replaced by a copy made while it ran"
    ]


def test_two_writers_write_one_chain(scene: Scene) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=scene.run, args=[f"writer {number}"] * 6) for number in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    log = scene.read()
    assert (log.problems, log.notes, log.count) == ([], [], 24)
    assert {command.result for command in scene.commands} == {"done"}


def test_a_reader_does_not_see_later_entries(filled: Scene) -> None:
    with filled.open() as keyring:
        log = AuditLog(keyring)
        filled.run("later", "much later")
        assert len(list(log)) == 6
    assert log.problems == []


def test_the_cost_of_an_entry_does_not_grow_with_the_log(
    filled: Scene, monkeypatch: pytest.MonkeyPatch
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


def test_lines_are_json(filled: Scene) -> None:
    for number, line in enumerate(filled.lines(), 1):
        assert json.loads(line[65:])["entry"] == number


def test_an_entry_of_another_process_reads_no_row_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scene.open() as keyring:
        keyring.ensure(["set/1"])
        scene.run("other")
        with monkeypatch.context() as patch:
            patch.setattr(KeyringStore, "rows", lambda _: pytest.fail("rows were read"))
            assert keyring.audit_state()[0] == 2
            keyring.sealing_key("set/1")
        with scene.open() as other:
            keyring_admin.revoke(other, "set/1")
        with pytest.raises(RevokedKey):
            keyring.sealing_key("set/1")
