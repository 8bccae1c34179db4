"""Read an audit log: check its entries against the keyring, and list the commands in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby

from engine.vault.audit import (
    NO_HASH,
    Entry,
    authentic_entry,
    line_hash,
    lines_of,
    log_path,
    mac_key,
)
from engine.vault.keyring import Keyring
from engine.vault.secret_files import check_private


class AuditLog:
    """The entries of a log, checked against its keyring.

    Iterate over it once; then `problems` and `notes` are complete.
    """

    def __init__(self, keyring: Keyring) -> None:
        """Read the state that the keyring has now; entries that follow later are not read."""
        self._path, self._keyring = log_path(keyring.store.path), keyring
        while True:
            self.count, self.last = keyring.audit_state()  # number of entries, hash of the last one
            is_missing = not os.path.lexists(self._path)
            self._size = 0 if is_missing else check_private(self._path, "audit log").st_size
            if keyring.audit_state() == (self.count, self.last):
                break
        self.problems: list[str] = []
        self.notes: list[str] = []  # what a killed or running command left; where the log begins
        if not self._size and self.count:
            self.problems.append(
                f"the log is missing or empty; the keyring counts {self.count} entries"
            )

    def __iter__(self) -> Iterator[Entry]:
        """Yield every authentic entry."""
        expected, previous, counted = 1, NO_HASH, NO_HASH
        missing: set[int] = set()
        bad: list[int] = []  # lines since the last authentic one
        key = mac_key(self._keyring) if self._size else b""
        lines = lines_of(self._path, self._size) if self._size else iter(())
        for position, (line, is_complete) in enumerate(lines, 1):
            if not is_complete and expected > self.count and not bad:
                self.notes.append(
                    "an incomplete line follows: its command was killed, and the next one removes "
                    "the line"
                )
                break
            entry = authentic_entry(key, line) if is_complete else None
            if entry is None:
                bad.append(position)
                continue
            number, is_new = entry["entry"], entry["event"] == "restart"
            if position == 1 and is_new:
                expected, previous = number, bytes.fromhex(entry["previous"])
                self.notes.append(f"begins with entry {number}: the log before was set aside")
            if number < expected:
                fault = "is out of order" if number in missing else "is there twice"
                missing.discard(number)
                self.problems.append(f"line {position}: entry {number} {fault}")
                continue
            if number == expected and entry["previous"] != previous.hex():
                self.problems.append(
                    f"line {position}: entry {number} does not continue the entry before it; one "
                    "of them is from another copy of the log"
                )
            if "counted" in entry:
                self.notes.append(
                    f"entry {entry['counted']} was not counted until entry {number}: its command "
                    "was killed, or the keyring was replaced by a copy made while it ran"
                )
            missing |= self._gap(expected, number, bad)
            expected, previous, bad = number + 1, line_hash(line), []
            if number == self.count:
                counted = previous
            yield entry
        end = self._gap(expected, max(expected, self.count + 1), bad)
        self._compare_end(expected, counted, end)
        self.problems += [f"{_entries(first, final)} missing" for first, final in _ranges(missing)]

    def _gap(self, expected: int, number: int, bad: list[int]) -> set[int]:
        """Report lines that are not authentic; return the entries that are missing among them."""
        gap = range(expected, number)
        if len(gap) == len(bad):
            self.problems += [
                f"line {position}: entry {entry} was changed"
                for position, entry in zip(bad, gap, strict=True)
            ]
            return set()
        self.problems += [f"line {position} is not authentic: changed or added" for position in bad]
        return set(gap)

    def _compare_end(self, expected: int, counted: bytes, end: set[int]) -> None:
        """Compare the end of the log with the state of the keyring."""
        found = expected - 1
        if end and self._size:
            self.problems.append(f"{_entries(min(end), max(end))} missing at the end")
        elif found == self.count + 1:
            self.notes.append(
                f"entry {found} is not counted yet: its command is running or was killed, and the "
                "next one counts it"
            )
        elif found > self.count:
            self.problems.append(
                f"the keyring counts {self.count} entries, the log has {found}: the keyring was "
                "replaced by an older copy"
            )
        if found >= self.count and counted != self.last:
            self.problems.append(
                f"entry {self.count} is not the one that the keyring counts; the log is from "
                "another copy of the keyring"
            )


@dataclass(frozen=True)
class Command:
    """One command in the log: the entry before it, and the entry after it."""

    entry: int  # the first entry
    time: datetime  # when it began
    # who ran it; the login only if it is another user
    user: str
    host: str
    command: str  # its name
    login: str | None = None
    # `done`, `confirmed` (`expire`), `interrupted`, or the class of the error; None if it is
    # running or was killed
    result: str | None = None
    files: int = 0
    failed: int = 0
    subjects: int = 0
    # files by key id in hexadecimal; 0 for a key used for other purposes
    keys: dict[str, int] = field(default_factory=dict)
    more_keys: int = 0  # keys that are not listed

    def is_named(self, name: str) -> bool:
        """Return whether the name of the command ends with these words."""
        return f" {self.command}".endswith(f" {name}")

    def concerns(self, key_id: str) -> bool:
        """Return whether the command used a key, or may have: not every key is listed."""
        return self.more_keys > 0 or any(key.startswith(key_id) for key in self.keys)


def commands(entries: Iterable[Entry]) -> Iterator[Command]:
    """Yield the commands of a log when they end, then those that did not end."""
    begun: dict[int, Entry] = {}
    for entry in entries:
        if entry["event"] == "begin":
            begun[entry["entry"]] = entry
        elif entry["event"] == "restart":
            yield _command(entry, {"result": "done"})
        else:
            begin = begun.pop(entry["begin"], None)
            if begin is not None:  # otherwise a problem of the log
                yield _command(begin, entry)
    for begin in begun.values():
        yield _command(begin, {})


def _command(begin: Entry, end: Entry) -> Command:
    counts = ("result", "files", "failed", "subjects", "keys", "more_keys")
    return Command(
        begin["entry"],
        datetime.fromisoformat(begin["time"]),
        begin["user"],
        begin["host"],
        begin["command"] if begin["event"] == "begin" else "audit --accept",
        begin.get("login"),
        **{name: end[name] for name in counts if name in end},
    )


def _entries(first: int, last: int) -> str:
    return f"entry {first} is" if first == last else f"entries {first} to {last} are"


def _ranges(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last number of each run of consecutive numbers."""
    # Within a run, a number minus its position is constant.
    for _, group in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]
