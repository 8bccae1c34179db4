"""Administration of a keyring: list, rotate, revoke, destroy, rekey, back up, export, import.

An export contains one subject's keys under a passphrase (docs/FORMAT.md)::

    "ISEX" | version 1 | length of the parameters, 1 byte | Argon2id parameters | salt, 32 bytes |
    SEAL(key from the passphrase, "export", aad = everything before, JSON)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path

from engine.vault.audit import copy_log, is_copied_log, log_path
from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import IMAGE, PURPOSES, HeadRow, KeyRow
from engine.vault.master import (
    EXPORT_LIMITS,
    KDF_SALT_BYTES,
    Argon2Cost,
    KeyFile,
    Master,
    NewMasterFile,
    Passphrase,
    drop_mark,
)
from engine.vault.secret_files import new_private_file, read_private, write_new_private
from engine.vault.subjects import checked_label
from modeling.encryption.ised_errors import (
    DestroyedKey,
    FormatError,
    KeyringCorrupt,
    KeyringError,
    KeyringExists,
    MissingKey,
    Tampered,
    UsageError,
    WrongKey,
)
from modeling.encryption.primitives import KEY_BYTES, open_sealed, random_key, seal
from modeling.encryption.sealed_image import LOCATOR_BYTES
from utils.errors import UserError
from utils.logger import Progress

_EXPORT_MAGIC = b"ISEX\x01"
_MAX_EXPORT_BYTES = 1 << 20  # about 6,000 keys
_EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class KeyInfo:
    """One key in the output of `list`; contains no secret except the label."""

    subject: str | None  # label; None after the key was destroyed
    key_id: str  # id of the key in hexadecimal
    generation: int  # 1 for a subject's first key
    state: str  # active, retired, revoked or destroyed
    imported: bool  # it came from another keyring
    created: date  # day on which it was created or imported
    purpose: str  # image or original
    used: date  # last day on which it was used to seal; its creation counts too


def list_keys(keyring: Keyring, subject: str | None = None) -> list[KeyInfo]:
    """Return the keys of a keyring, or of one subject, by label, purpose and generation."""
    keyring.refresh()
    return infos_of(keyring, keyring.rows if subject is None else keyring.rows_of(subject))


def infos_of(keyring: Keyring, rows: Iterable[KeyRow]) -> list[KeyInfo]:
    """Return what `list` shows about rows, by label, purpose and generation."""
    infos = [
        KeyInfo(
            subject=keyring.label_of(row),
            key_id=row.key_id.hex(),
            generation=row.generation,
            state=row.state,
            imported=bool(row.imported),
            created=_EPOCH + timedelta(days=row.created_day),
            purpose=row.purpose,
            used=_EPOCH + timedelta(days=row.used_day),
        )
        for row in rows
    ]
    return sorted(infos, key=lambda x: (x.subject or "\uffff", x.purpose, x.generation, x.key_id))


def rotate(keyring: Keyring, subject: str, purpose: str | None = None) -> list[KeyInfo]:
    """Create and return a new active key for each purpose; files under former keys still open.

    Also creates the first new key after all former keys were revoked or destroyed. The purposes are
    by default `image`, and `original` if the subject has an active key for it.

    Raises:
        MissingKey: The keyring has never had a key of the subject.
    """
    new = []
    with keyring.writing():
        rows = [row for row in subject_rows(keyring, subject) if row.state == "active"]
        purposes = {IMAGE, *(row.purpose for row in rows)} if purpose is None else {purpose}
        for row in rows:
            if row.purpose in purposes:
                keyring.put(replace(row, state="retired"), keyring.unwrap(row))
        for name in sorted(purposes):
            row = keyring.new_row(subject, "active", purpose=name)
            new.append(keyring.put(row, random_key()))
        return infos_of(keyring, new)


def revoke(keyring: Keyring, subject: str) -> int:
    """Forbid the use of a subject's keys until `restore`; return how many changed.

    Returns 0 if they were revoked already, so that a killed command can be run again.

    Raises:
        MissingKey: The subject has no key, or its keys were destroyed.
    """
    with keyring.writing():
        return _set_state(keyring, subject, "revoked", ("active", "retired"))


def restore(keyring: Keyring, subject: str) -> int:
    """Undo `revoke`; return how many keys changed, 0 if `revoke` was undone already.

    For each purpose, the newest key that is not imported becomes active if no key is; the others
    become retired.

    Raises:
        MissingKey: The subject has no key, or its keys were destroyed.
    """
    with keyring.writing():
        rows = subject_rows(keyring, subject)
        if all(row.state == "destroyed" for row in rows):
            raise MissingKey(f"no key of subject {subject!r} is revoked: all were destroyed")
        revoked = [row for row in rows if row.state == "revoked"]
        active = {row.purpose for row in rows if row.state == "active"}
        for row in reversed(revoked):  # the newest first
            state = "retired" if row.imported or row.purpose in active else "active"
            keyring.put(replace(row, state=state), keyring.unwrap(row))
            if state == "active":
                active.add(row.purpose)
    return len(revoked)


def destroy(keyring: Keyring, *subjects: str, purpose: str | None = None) -> int:
    """Destroy every key of subjects, or of one purpose: their files can never be opened again.

    Returns how many; 0 if they were destroyed already, so that a killed command can be run again.
    All are destroyed in one transaction, or none.

    A tombstone without key and label stays, so that no new key is created by accident. Earlier
    copies of the keyring still contain the keys, under their root key: docs/ISED.md.

    Raises:
        MissingKey: The keyring has never had such a key of one of the subjects.
    """
    former = ("active", "retired", "revoked")
    with keyring.writing():
        return sum(_set_state(keyring, name, "destroyed", former, purpose) for name in subjects)


def rekey(keyring: Keyring, master: Master) -> None:
    """Change the master and the root; every row is wrapped again, no sealed file changes.

    After a failure the old master is in force, and there is no new key file. After a kill one of
    the two masters is in force, and the same call resumes: see `is_in_force`.

    Raises:
        UsageError: The new master is a key file that exists already.
    """
    before = keyring.head
    new_file = NewMasterFile(master.path, before) if isinstance(master, KeyFile) else None
    # Before the keyring is held: a command may take a minute, and other processes wait 20 s.
    new_key = master.new_key() if new_file is None else None
    try:
        with keyring.writing():
            if new_file is not None:
                new_file.make()
            keyring.change_root(master.kdf, new_key or master.new_key())
    except BaseException:
        if new_file is not None:
            _remove_unless_in_force(keyring, before, new_file)
        raise
    if isinstance(master, KeyFile):
        drop_mark(master.path, before.keyring_id, before.epoch)


def _remove_unless_in_force(keyring: Keyring, before: HeadRow, new_file: NewMasterFile) -> None:
    """Remove a new key file unless the keyring is under it: an error may follow the commit.

    The keyring is held meanwhile, so that no other rekey uses the same key file. If it cannot be
    held or read, the key file and its mark stay, and the same call resumes.
    """
    with suppress(UserError, OSError), keyring.store.transaction(write=True):
        if keyring.store.head().root_wrap == before.root_wrap:
            new_file.remove()


def is_in_force(path: Path, master: KeyFile) -> bool:
    """Return whether a rekey to this master was committed but killed before it finished.

    The master must open the keyring and have the mark of that rekey, which is deleted. Without the
    mark, a user who confuses two keyrings would be advised to destroy the other keyring's master.
    """
    try:
        with Keyring.open(path, master) as keyring:
            head = keyring.head
    except KeyringError:
        return False
    return drop_mark(master.path, head.keyring_id, head.epoch - 1)


def backup(keyring: Keyring, path: Path, master: Master) -> int:
    """Copy the keyring to a new file and open every row of the copy; return the number of rows.

    Its audit log is copied too, up to the last entry that the copy counts. The log gets its name
    first; without its keyring it is deleted, at the end of a failed call or, after a kill, by the
    next call.

    Raises:
        KeyringExists: The target exists.
        KeyringCorrupt: A row of the copy does not open.
    """
    log, copied, has_log = log_path(keyring.store.path), log_path(path), False
    try:
        if os.path.lexists(path):
            raise FileExistsError
        with new_private_file(path) as temporary:
            others = set(path.parent.glob(f".{path.name}.*.tmp")) - {temporary}
            if not others and is_copied_log(copied, log):  # no other backup to this target runs
                copied.unlink()
            keyring.store.copy_to(temporary)
            with Keyring.open(temporary, master) as copy:
                for row in Progress.over(copy.rows, "Check the copy", unit="key"):
                    if row.wrapped is not None:
                        copy.unwrap(row)
                    copy.label_of(row)
                count, last = copy.audit_state()
                copy_log(keyring.store.path, path, last)
                has_log = count > 0
                return len(copy.rows)
    except BaseException as error:
        if has_log and not os.path.lexists(path):
            copied.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise KeyringExists(
                f"{path} or its audit log exists already; a backup never overwrites"
            ) from None
        raise


def export_subject(keyring: Keyring, subject: str, path: Path, passphrase: Passphrase) -> int:
    """Write a subject's usable keys to a new file; return how many.

    The locator key is not exported: with it the receiver could sort all files by person.

    Raises:
        MissingKey: The subject has no usable key.
        KeyringExists: The target exists.
        UsageError: The passphrase is too short, or its cost above `EXPORT_LIMITS`.
    """
    passphrase.check_strength()
    params = str(passphrase.cost)
    try:
        Argon2Cost.parse(params, EXPORT_LIMITS)
    except KeyringCorrupt as error:
        raise UsageError(f"{error}; choose a lower cost for an export") from None
    keyring.refresh()
    usable = [row for row in keyring.rows_of(subject) if row.state in ("active", "retired")]
    if not usable:
        raise MissingKey(f"subject {subject!r} has no usable key to export")
    keys = [
        {"key_id": row.key_id.hex(), "key": keyring.unwrap(row).hex(), "purpose": row.purpose}
        for row in usable
    ]
    content = {"subject": subject, "keys": keys}
    salt = random_key()
    head = _EXPORT_MAGIC + bytes([len(params)]) + params.encode() + salt
    key = passphrase.unlock(params, salt)
    try:
        write_new_private(path, head + seal(key, "export", head, json.dumps(content).encode()))
    except FileExistsError:
        raise KeyringExists(f"{path} exists already; an export never overwrites") from None
    return len(usable)


def import_subject(keyring: Keyring, path: Path, passphrase: Passphrase) -> tuple[str, int]:
    """Add the keys of an export; return (subject, number of new keys).

    Imported keys open files and never seal, whatever the export contains: its author knows them,
    and `revoke --undo` must not turn one of them into the key of new files.

    Raises:
        FormatError: It is not an export.
        WrongKey: The passphrase is another one.
        Tampered: It was changed.
        DestroyedKey: One of its keys was destroyed in this keyring.
    """
    stored = read_private(path, "exported keys", _MAX_EXPORT_BYTES + 1)
    if len(stored) > _MAX_EXPORT_BYTES:
        raise FormatError(f"{path} is larger than any file of exported keys", _MAX_EXPORT_BYTES)
    head, params, salt = _split_export(stored)
    key = passphrase.unlock(params, salt)
    try:
        content = open_sealed(key, "export", head, stored[len(head) :])
    except WrongKey:
        raise WrongKey(f"the passphrase is not that of {path}") from None
    subject, keys = _parse_export(content)
    added = 0
    with keyring.writing():
        for key_id, key, purpose in keys:
            known = keyring.row(key_id)
            if known is None:
                row = keyring.new_row(subject, "retired", key_id, purpose)
                keyring.put(replace(row, imported=1), key)
                added += 1
            elif known.state == "destroyed":
                raise DestroyedKey("a key of this export was destroyed here and stays destroyed")
    return subject, added


def _split_export(stored: bytes) -> tuple[bytes, str, bytes]:
    """Return (head, Argon2id parameters, salt) of an export."""
    start = len(_EXPORT_MAGIC) + 1
    if not stored.startswith(_EXPORT_MAGIC) or len(stored) < start:
        raise FormatError("not a file of exported keys", 0)
    end = start + stored[start - 1]
    head = stored[: end + KDF_SALT_BYTES]
    try:
        params = str(Argon2Cost.parse(stored[start:end].decode("ascii"), EXPORT_LIMITS))
    except UnicodeDecodeError:
        raise FormatError("the passphrase parameters of the export are damaged", start) from None
    except KeyringCorrupt as error:
        raise FormatError(f"the export is damaged or hostile: {error}", start) from None
    if len(head) < end + KDF_SALT_BYTES:
        raise FormatError("truncated inside the salt", len(stored))
    return head, params, head[end:]


def _parse_export(content: bytes) -> tuple[str, list[tuple[bytes, bytes, str]]]:
    """Return (subject, [(key id, key, purpose)]) of an export, whose author may be malicious."""
    try:
        parsed = json.loads(content)
        keys = [
            (bytes.fromhex(k["key_id"]), bytes.fromhex(k["key"]), k.get("purpose", IMAGE))
            for k in parsed["keys"]
        ]
        subject = checked_label(str(parsed["subject"]))
        if not all(purpose in PURPOSES for _, _, purpose in keys):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise Tampered("the export has a content that this program does not write") from None
    if any(len(key_id) != LOCATOR_BYTES or len(key) != KEY_BYTES for key_id, key, _ in keys):
        raise Tampered("the export has keys of the wrong length")
    return subject, keys


def _set_state(
    keyring: Keyring, subject: str, state: str, changed: tuple[str, ...], purpose: str | None = None
) -> int:
    """Give those keys of a subject that are in a state of ``changed`` a new state; return how many.

    Call this within `writing` only.
    """
    rows = subject_rows(keyring, subject, purpose)
    if not any(row.state in (*changed, state) for row in rows):
        raise MissingKey(f"subject {subject!r} has no key that could become {state}")
    rows = [row for row in rows if row.state in changed]
    for row in rows:
        if state == "destroyed":
            # The label, from which other spellings are found, is erased: use the usual tag.
            tag = keyring.subject_tag(subject)
            keyring.put(replace(row, state=state, label_ct=None, subject_tag=tag), None)
        else:
            keyring.put(replace(row, state=state), keyring.unwrap(row))
    return len(rows)


def subject_rows(keyring: Keyring, subject: str, purpose: str | None = None) -> list[KeyRow]:
    """Return a subject's rows; raise MissingKey if there are none."""
    rows = keyring.rows_of(subject, purpose)
    if not rows:
        use = "" if purpose is None else f" and purpose {purpose!r}"
        raise MissingKey(
            f"no key of subject {subject!r}{use} in this keyring; `keyring list` shows all subjects"
        )
    return rows
