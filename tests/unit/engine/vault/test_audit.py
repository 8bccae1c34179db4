"""The audit log contains what commands did, and names every change of its entries."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.vault import audit, keyring_admin
from engine.vault.audit import MAX_KEYS, copy_log, recorded, restart
from engine.vault.audit_reader import AuditLog, Command
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from modeling.encryption.ised_errors import (
    InsecurePermissions,
    KeyringCorrupt,
    KeyringExists,
    MissingKey,
)
from tests.fixtures.keyrings import LoggedKeyring, to_format


def test_entries_contain_who_what_and_when(logged: LoggedKeyring) -> None:
    with logged.open() as keyring, recorded(keyring, "protect protect"):
        key = keyring.sealing_key("set/Jane Doe")
        keyring.sealing_key("set/Jane Doe")
        keyring.use.failed = 3
    log = logged.read()
    assert (log.problems, log.notes, log.count) == ([], [], 2)
    (command,) = logged.commands
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
    assert logged.log.stat().st_mode & 0o777 == 0o600
    assert b"Jane" not in logged.log.read_bytes()


@pytest.mark.parametrize(
    ("error", "result"), [(MissingKey("x"), "MissingKey"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_failed_command_is_entered_with_its_error(
    logged: LoggedKeyring, error: BaseException, result: str
) -> None:
    with pytest.raises(type(error)), logged.open() as keyring, recorded(keyring, "open"):
        raise error
    assert logged.read().problems == []
    assert [command.result for command in logged.commands] == [result]


def test_keys_that_were_written_are_entered(logged: LoggedKeyring) -> None:
    with logged.open() as keyring:
        keyring.ensure(["set/1", "set/2"])
        (row,) = keyring.rows_of("set/1")
    with logged.open() as keyring, recorded(keyring, "keyring destroy"):
        keyring_admin.destroy(keyring, "set/1")
    logged.read()
    assert logged.commands[0].keys == {row.key_id.hex(): 0}
    assert logged.commands[0].concerns(row.key_id.hex()[:12])
    assert not logged.commands[0].concerns("00" * 16)


def test_an_entry_lists_a_bounded_number_of_keys(
    logged: LoggedKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_KEYS", 2)
    with logged.open() as keyring, recorded(keyring, "protect protect"):
        keyring.ensure([f"set/{number}" for number in range(5)])
    logged.read()
    (command,) = logged.commands
    assert (len(command.keys), command.more_keys, command.subjects) == (2, 3, 5)
    assert command.concerns("00" * 16)  # it may have used any key


def test_the_longest_entry_is_read_again(logged: LoggedKeyring) -> None:
    with logged.open() as keyring, recorded(keyring, "protect protect"):
        keyring.use.keys |= {os.urandom(16) for _ in range(MAX_KEYS + 1)}
        keyring.use.files.update(dict.fromkeys(keyring.use.keys, 10**9))
    logged.run("next")
    assert logged.read().problems == []


def test_names_of_commands() -> None:
    command = Command(1, None, "", "", "keyring shares create")  # type: ignore[arg-type]
    for name, is_named in (("create", True), ("shares create", True), ("ate", False)):
        assert command.is_named(name) is is_named


def test_a_rekey_continues_the_log(filled: LoggedKeyring) -> None:
    new = KeyFile(filled.path.with_name("new.key"))
    with filled.open() as keyring, recorded(keyring, "keyring rekey"):
        keyring_admin.rekey(keyring, new)
    filled.master = new
    filled.run("after")
    assert filled.read().problems == []
    assert [c.command for c in filled.commands][-2:] == ["keyring rekey", "after"]


def test_an_older_keyring_gets_a_log(logged: LoggedKeyring) -> None:
    with logged.open() as keyring:
        to_format(2, keyring)
    assert logged.read().problems == []
    assert logged.commands == []
    logged.run("first")
    assert logged.read().problems == []
    assert [command.command for command in logged.commands] == ["first"]


# ---- changes of the log -------------------------------------------------------------------------


def _accepted_changes(
    logged: LoggedKeyring, bits: Callable[[int], list[int]]
) -> list[tuple[int, int]]:
    """Return the positions and bits of a log that can be changed without a problem."""
    content, accepted = logged.log.read_bytes(), []
    with logged.open() as keyring:
        number = len(list(AuditLog(keyring)))
        for place in range(len(content)):
            for bit in bits(place):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                logged.log.write_bytes(changed)
                log = AuditLog(keyring)
                if len(list(log)) == number or not log.problems:
                    accepted.append((place, bit))
    return accepted


def test_no_changed_byte_is_accepted(logged: LoggedKeyring) -> None:
    logged.run("one")
    assert _accepted_changes(logged, lambda place: [place % 8]) == []


@pytest.mark.slow
def test_no_changed_bit_is_accepted(logged: LoggedKeyring) -> None:
    logged.run("one", "two")
    assert _accepted_changes(logged, lambda _: list(range(8))) == []


def test_a_changed_entry_is_named(filled: LoggedKeyring) -> None:
    lines = filled.lines()
    lines[2] = lines[2].replace(b'"two"', b'"owt"')
    assert filled.problems(*lines) == ["line 3: entry 3 was changed"]
    lines = [*lines[:5], lines[5].replace(b'"done"', b'"gone"')]
    assert filled.problems(*lines)[-1] == "line 6: entry 6 was changed"


def test_removed_entries_are_named(filled: LoggedKeyring) -> None:
    one, two, three, four, five, six = filled.lines()
    assert filled.problems(two, three, four, five, six) == ["entry 1 is missing"]
    assert filled.problems(one, two, five, six) == ["entries 3 to 4 are missing"]
    assert filled.problems(two, four, five, six) == ["entry 1 is missing", "entry 3 is missing"]


def test_a_truncated_end_is_named(filled: LoggedKeyring) -> None:
    lines = filled.lines()
    assert filled.problems(*lines[:5]) == ["entry 6 is missing at the end"]
    assert filled.problems(*lines[:2]) == ["entries 3 to 6 are missing at the end"]
    missing = "the log is missing or empty; the keyring counts 6 entries"
    assert filled.problems() == [missing]
    assert filled.problems(*lines[:5], lines[5][:-1]) == ["line 6: entry 6 was changed"]
    filled.log.unlink()
    assert filled.read().problems == [missing]


def test_reordered_and_repeated_entries_are_named(filled: LoggedKeyring) -> None:
    one, two, three, four, five, six = filled.lines()
    assert filled.problems(one, three, two, four, five, six) == ["line 3: entry 2 is out of order"]
    assert filled.problems(one, two, three, four, six, five)[0] == (
        "line 6: entry 5 is out of order"
    )
    assert filled.problems(one, two, two, three, four, five, six) == [
        "line 3: entry 2 is there twice"
    ]


def test_added_lines_are_named(filled: LoggedKeyring) -> None:
    lines = filled.lines()
    forged = b"0" * 64 + lines[0][64:]
    assert filled.problems(*lines[:3], forged, *lines[3:]) == [
        "line 4 is not authentic: changed or added"
    ]
    assert filled.problems(*lines, forged) == ["line 7 is not authentic: changed or added"]
    assert filled.problems(*lines, b"\n") == ["line 7 is not authentic: changed or added"]


def test_entries_of_another_keyring_are_named(filled: LoggedKeyring, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = LoggedKeyring(tmp_path / "other")
    other.run("one", "two", "three")
    lines = filled.lines()
    assert filled.problems(*lines[:2], other.lines()[2], *lines[3:]) == [
        "line 3: entry 3 was changed"
    ]


def test_an_older_copy_of_the_keyring_is_detected(logged: LoggedKeyring) -> None:
    logged.run("one")
    shutil.copy(logged.path, logged.path.with_name("copy"))
    logged.run("two")
    logged.path.write_bytes(logged.path.with_name("copy").read_bytes())
    assert logged.read().problems == [
        "the keyring counts 2 entries, the log has 4: the keyring was replaced by an older copy"
    ]
    with pytest.raises(KeyringCorrupt, match="audit --accept"):
        logged.run("three")


def test_an_entry_from_another_copy_of_the_keyring_is_detected(logged: LoggedKeyring) -> None:
    """Both copies authenticate their entries with the same key."""
    logged.run("one")
    copies = [(path, path.read_bytes()) for path in (logged.path, logged.log)]
    logged.run("two")
    foreign = logged.lines()[2:]
    for path, content in copies:
        path.write_bytes(content)
    logged.run("three")
    lines = logged.lines()
    problems = logged.problems(*lines[:2], *foreign)
    assert problems == [
        "entry 4 is not the one that the keyring counts; the log is from another copy of the "
        "keyring"
    ]
    assert "does not continue the entry before it" in logged.problems(*lines[:3], foreign[1])[0]


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
    filled: LoggedKeyring, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    changed = b"".join(damage(filled.lines()))
    filled.log.write_bytes(changed)
    with pytest.raises(KeyringCorrupt, match="does not end with entry 6"):
        filled.run("four")
    assert filled.log.read_bytes() == changed
    filled.log.unlink()
    with pytest.raises(KeyringCorrupt, match="is missing, of which the keyring counts 6 entries"):
        filled.run("four")


def test_accepting_sets_the_log_aside_and_begins_a_marked_one(filled: LoggedKeyring) -> None:
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


def test_a_log_that_others_can_read_is_refused(filled: LoggedKeyring) -> None:
    filled.log.chmod(0o644)
    with pytest.raises(InsecurePermissions, match="chmod 600"):
        filled.run("four")
    filled.log.rename(filled.log.with_name("elsewhere"))
    filled.log.symlink_to("elsewhere")
    with pytest.raises(InsecurePermissions, match="symbolic link"):
        filled.run("four")


def test_a_new_keyring_does_not_continue_a_former_log(filled: LoggedKeyring) -> None:
    filled.path.unlink()
    with pytest.raises(KeyringExists, match="keys.db.audit exists already"):
        Keyring.create(filled.path, filled.master)
    assert not filled.path.exists()


# ---- backup -------------------------------------------------------------------------------------


def test_a_backup_contains_the_log(filled: LoggedKeyring, tmp_path: Path) -> None:
    copy = LoggedKeyring.__new__(LoggedKeyring)
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


def test_a_log_that_does_not_match_is_not_copied(filled: LoggedKeyring, tmp_path: Path) -> None:
    with pytest.raises(KeyringCorrupt, match="audit --verify"):
        copy_log(filled.path, tmp_path / "copy.db", b"x" * 32)
    assert not (tmp_path / "copy.db.audit").exists()
