"""The audit log of a keyring: two entries for every command that uses it, in `KEYRING.audit`.

An entry is one line: an HMAC under the audit key of the keyring, and a JSON object. The object
contains the number of the entry and the hash of the line before. The keyring contains the number of
entries and the hash of the last one. So a changed, removed, added or reordered entry is detected,
and so are a truncated log and a keyring that was replaced by an older copy (docs/FORMAT.md).

An entry is written within a write transaction of the keyring: first the line, then the state. A
process that is killed in between leaves one line that the keyring does not count. It is authentic,
so the next command counts it.
"""

from __future__ import annotations

import hmac
import json
import os
import pwd
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.vault.secret_files import check_private, new_private_file
from modeling.encryption.ised_errors import (
    InsecurePermissions,
    KeyringCorrupt,
    KeyringError,
    StorageError,
)
from modeling.encryption.primitives import derive_key, hmac_sha256
from utils.errors import UserError
from utils.files import PRIVATE_MODE, sync_folder

if TYPE_CHECKING:
    from engine.vault.keyring import Keyring

MAX_KEYS = 1000  # keys that an entry lists by id; further keys are counted

NO_HASH = bytes(32)  # stands for the line before the first one
_MAX_LINE = 1 << 17  # bytes; above the length of an entry with MAX_KEYS keys
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LOGIN_ID = Path("/proc/self/loginuid")
_NO_LOGIN = (1 << 32) - 1

Entry = dict[str, Any]


@dataclass
class KeyUse:
    """What a command did with the keys of a keyring."""

    keys: set[bytes] = field(default_factory=set)  # ids of the keys that were unwrapped or written
    # files that were sealed or opened, by key id
    files: Counter[bytes] = field(default_factory=Counter)
    failed: int = 0  # files that failed
    result: str = "done"  # `done`, unless the command sets another word


def log_path(keyring: Path) -> Path:
    """Return the path of the audit log of a keyring."""
    return keyring.with_name(f"{keyring.name}.audit")


@contextmanager
def recorded(keyring: Keyring, command: str) -> Iterator[None]:
    """Write an entry before and after a command that uses an open keyring.

    Without the first entry, a killed command would leave no trace. The second contains the result
    and the counts of `keyring.use`.

    Raises:
        StorageError: An entry cannot be written; the command fails.
        KeyringCorrupt: The log does not match the keyring.
    """
    number = _append(keyring, {"event": "begin", "command": command, **_who()})
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        keyring.use.result = "interrupted" if interrupted else type(error).__name__
        with suppress(UserError, OSError):  # the original error matters more
            _append(keyring, _end(keyring, number))
        raise
    try:
        _append(keyring, _end(keyring, number))
    except (StorageError, KeyringError) as error:  # the advice to run it again would be wrong
        raise StorageError(f"`{command}` ended, but its audit entry is missing: {error}") from None


def restart(keyring: Keyring) -> Path | None:
    """Begin a new log after the old one was lost or changed; return the new path of the old log.

    The first entry of the new log is marked. It continues the numbers that the keyring counts.
    """
    path, key = log_path(keyring.store.path), mac_key(keyring)
    with keyring.writing():
        count, last = keyring.audit_state()
        kept = _set_aside(path) if os.path.lexists(path) else None
        line = _line(key, count + 1, last, {"event": "restart", "command": "audit", **_who()})
        with _opened(path, count=0) as descriptor:
            _write(descriptor, line, path)
        keyring.set_audit_state(count + 1, line_hash(line))
    return kept


def copy_log(keyring: Path, target: Path, last: bytes) -> None:
    """Copy a log, up to the line with this hash, next to a copy of its keyring.

    Raises:
        FileExistsError: The target has a log.
        KeyringCorrupt: The log has no line with this hash.
        StorageError: The copy cannot be written.
    """
    if last == NO_HASH:
        return
    source = log_path(keyring)
    with new_private_file(log_path(target)) as temporary, temporary.open("wb") as copy:
        for line, _ in lines_of(source):
            copy.write(line + b"\n")
            if line_hash(line) == last:
                return
        raise KeyringCorrupt(f"{source} does not match {keyring}; run `keyring audit --verify`")


def is_copied_log(path: Path, source: Path) -> bool:
    """Return whether a file contains only lines of another log, from the first one on."""
    if path.is_symlink() or not path.is_file() or not source.is_file():
        return False
    lines = zip_longest(lines_of(path), lines_of(source, path.stat().st_size))
    return all(copied == line for copied, line in lines)


def _append(keyring: Keyring, content: Entry) -> int:
    """Append one entry and count it; return its number."""
    _check_writable(keyring.store.path)
    path, key = log_path(keyring.store.path), mac_key(keyring)
    counted: Entry = {}
    while True:
        with keyring.writing():
            count, last = keyring.audit_state()
            with _opened(path, count) as descriptor:
                uncounted = _uncounted(descriptor, path, key, count, last)
                line = uncounted or _line(key, count + 1, last, {**content, **counted})
                if uncounted is None:
                    _write(descriptor, line, path)
            keyring.set_audit_state(count + 1, line_hash(line))
        # An uncounted line was committed first, so that there is never more than one.
        if uncounted is None:
            return count + 1
        counted = {"counted": count + 1}


def _uncounted(descriptor: int, path: Path, key: bytes, count: int, last: bytes) -> bytes | None:
    """Return the line at the end of a log that the keyring does not count, if there is one.

    Also removes the incomplete line of a process that was killed while it wrote.
    """
    size = os.fstat(descriptor).st_size
    start = max(0, size - 3 * _MAX_LINE)
    *lines, incomplete = os.pread(descriptor, size - start, start).split(b"\n")
    if start:
        del lines[0]  # its beginning was not read
    hashes = [line_hash(line) for line in lines[-2:]]
    uncounted = None
    if hashes[-1:] != ([last] if count else []):
        entry = (authentic_entry(key, lines[-1]) if lines else None) or {}
        follows = (entry.get("entry"), entry.get("previous")) == (count + 1, last.hex())
        # The counted line must be there, unless the uncounted one begins the log.
        begins = len(lines) == 1 and not start and (count == 0 or entry.get("event") == "restart")
        if not follows or not (begins or hashes[:-1] == [last]):
            raise KeyringCorrupt(
                f"audit log {path} does not end with entry {count}, the last one that the keyring "
                "counts: one of the two was changed, or restored from a backup; "
                "`keyring audit --verify` names the difference, `keyring audit --accept` begins a "
                "new log"
            )
        uncounted = lines[-1]
    if incomplete:
        os.ftruncate(descriptor, size - len(incomplete))
        os.fsync(descriptor)
    return uncounted


def _line(key: bytes, number: int, previous: bytes, content: Entry) -> bytes:
    """Return the line of an entry, without its newline."""
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = {"entry": number, "previous": previous.hex(), "time": time, **content}
    text = json.dumps(entry, separators=(",", ":")).encode()
    return hmac_sha256(key, text).hex().encode() + b" " + text


def _who() -> Entry:
    """Return user and host. With sudo or su, the login is the user who opened the session."""
    who = {"user": _user_name(os.getuid()), "host": socket.gethostname()}
    with suppress(OSError, ValueError):
        login = int(_LOGIN_ID.read_text("ascii"))
        if login not in (_NO_LOGIN, os.getuid()):
            who["login"] = _user_name(login)
    return who


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"uid {number}"


def _end(keyring: Keyring, number: int) -> Entry:
    """Return the content of the entry after the command that began with an entry."""
    use = keyring.use
    rows = [row for row in map(keyring.row, use.keys) if row is not None]
    listed = sorted(use.keys)[:MAX_KEYS]
    return {
        "event": "end",
        "begin": number,
        "result": use.result,
        "files": sum(use.files.values()),
        "failed": use.failed,
        "subjects": len({row.subject_tag for row in rows}),
        "keys": {key_id.hex(): use.files[key_id] for key_id in listed},
        "more_keys": len(use.keys) - len(listed),
    }


@contextmanager
def _opened(path: Path, count: int) -> Iterator[int]:
    """Yield the descriptor of a log, which is created if the keyring counts no entry."""
    try:
        if os.path.lexists(path):
            checked = check_private(path, "audit log")
            descriptor = os.open(path, _FLAGS)
            if not os.path.samestat(checked, os.fstat(descriptor)):
                raise InsecurePermissions(f"audit log {path} was replaced while it was opened")
        elif count:
            raise KeyringCorrupt(
                f"audit log {path} is missing, of which the keyring counts {count} entries; move "
                "it back, or run `keyring audit --accept` to begin a new log"
            )
        else:
            descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
            sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, line: bytes, path: Path) -> None:
    """Append a line and wait until it is on the disk; after an error the log is unchanged."""
    size = os.fstat(descriptor).st_size
    try:
        rest = memoryview(line + b"\n")
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise _not_written(path, error) from None


def _check_writable(keyring: Path) -> None:
    """Raise StorageError if a keyring, or the folder that gets its log, cannot be written to."""
    for path in (keyring, keyring.parent):
        if not os.access(path, os.W_OK):
            raise StorageError(
                f"{path} cannot be written to, so the command cannot be entered into the audit "
                "log; copy keyring and log to a folder that you may write to"
            )


def _set_aside(path: Path) -> Path:
    """Rename a log to a free name; return the name."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    path.rename(kept)
    return kept


def _not_written(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write the audit log {path}: {error.strerror}; without it no command uses the "
        "keyring"
    )


def lines_of(path: Path, size: int | None = None) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines in the first bytes of a log, and whether each ends with a newline."""
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0:
            line = file.readline(min(left, _MAX_LINE))
            if not line:
                return
            left -= len(line)
            yield line.removesuffix(b"\n"), line.endswith(b"\n")


def authentic_entry(key: bytes, line: bytes) -> Entry | None:
    """Return the entry in a line, or None if it was not written with this key."""
    code, blank, text = line[:64], line[64:65], line[65:]
    if blank != b" " or not hmac.compare_digest(code, hmac_sha256(key, text).hex().encode()):
        return None
    entry: Entry = json.loads(text)
    return entry


def mac_key(keyring: Keyring) -> bytes:
    """Return the key of the HMACs in the log of a keyring."""
    return derive_key(keyring.audit_key(), "audit entry")


def line_hash(line: bytes) -> bytes:
    """Return the hash of a line, without its newline, that the next entry contains."""
    return sha256(line).digest()
