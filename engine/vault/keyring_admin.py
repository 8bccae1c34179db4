"""What the holder of a keyring does with it: list, rotate, revoke, destroy, rekey, back up.

One person's keys in a file under a passphrase, to open that person's pictures elsewhere.

::

    "ISEX" | version 1 | length of the parameters, 1 byte | Argon2id parameters | salt, 32 bytes |
    SEAL(key from the passphrase, "export", aad = everything before, JSON)
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from engine.vault.keyring import Keyring
from engine.vault.keyring_store import HeadRow, KeyRow
from engine.vault.master import (
    KDF_SALT_BYTES,
    Argon2Cost,
    KeyFile,
    Master,
    NewMasterFile,
    Passphrase,
    drop_mark,
)
from engine.vault.secret_files import new_private_file, read_private, write_new_private
from modeling.encryption.ised_errors import (
    DestroyedKey,
    FormatError,
    KeyringError,
    KeyringExists,
    MissingKey,
    Tampered,
    WrongKey,
)
from modeling.encryption.primitives import KEY_BYTES, open_sealed, random_key, seal
from modeling.encryption.sealed_image import LOCATOR_BYTES
from utils.errors import UserError


@dataclass(frozen=True)
class KeyInfo:
    """One key as `list` shows it; nothing secret but the label.

    Attributes:
        subject: Label, or None once the key was destroyed.
        key_id: Name of the key in hexadecimal.
        generation: 1 for a subject's first key.
        state: active, retired, revoked or destroyed.
        imported: Whether it came from another keyring.
        created: Day it was made or imported.
    """

    subject: str | None
    key_id: str
    generation: int
    state: str
    imported: bool
    created: datetime.date


def list_keys(keyring: Keyring, subject: str | None = None) -> list[KeyInfo]:
    """Return the keys of a keyring, or of one subject, by label and generation."""
    keyring.refresh()
    rows = keyring.rows if subject is None else keyring.rows_of(subject)
    infos = [_info(keyring, row) for row in rows]
    return sorted(infos, key=lambda info: (info.subject or "\uffff", info.generation, info.key_id))


def rotate(keyring: Keyring, subject: str) -> KeyInfo:
    """Give a subject a new key; files under its former keys still open.

    It also makes the first new key after all former ones were destroyed, or revoked.

    Raises:
        MissingKey: The keyring has never had a key of that subject.
    """
    with keyring.writing():
        for row in _rows_of(keyring, subject):
            if row.state == "active":
                keyring.put(replace(row, state="retired"), keyring.unwrap(row))
        row = keyring.put(keyring.new_row(subject, "active"), random_key())
    return _info(keyring, row)


def revoke(keyring: Keyring, subject: str) -> int:
    """Forbid the use of a subject's keys until `restore`; return how many.

    Raises:
        MissingKey: There is none that is in use.
    """
    return _change(keyring, subject, "revoked", lambda row: row.state in ("active", "retired"))


def restore(keyring: Keyring, subject: str) -> int:
    """Undo `revoke`: the newest own key becomes active if none is, the others retired.

    Raises:
        MissingKey: No key of the subject is revoked.
    """
    with keyring.writing():
        rows = _rows_of(keyring, subject)
        revoked = [row for row in rows if row.state == "revoked"]
        if not revoked:
            raise MissingKey(f"no key of subject {subject!r} is revoked")
        active = next((row.key_id for row in rows if row.state == "active"), None)
        if active is None:
            active = next((row.key_id for row in reversed(revoked) if not row.imported), None)
        for row in revoked:
            state = "active" if row.key_id == active else "retired"
            keyring.put(replace(row, state=state), keyring.unwrap(row))
    return len(revoked)


def destroy(keyring: Keyring, subject: str) -> int:
    """Destroy every key of a subject for good: its files can never be opened again.

    What stays is a tombstone without key and label, so that no key is made by accident. Copies of
    the keyring made before still hold the keys, under the root of that time: docs/ISED.md.

    Raises:
        MissingKey: There is none left.
    """
    return _change(keyring, subject, "destroyed", lambda row: row.state != "destroyed")


def rekey(keyring: Keyring, master: Master) -> None:
    """Change the master and the root; every row is wrapped anew, no file changes.

    A failure leaves the old master in force and no new key file. After a kill one of the two
    masters is in force, and the same call goes on: see `is_in_force`.

    Raises:
        UsageError: The new master is a key file that exists already.
    """
    before = keyring.head
    made = NewMasterFile(master.path, before) if isinstance(master, KeyFile) else None
    try:
        with keyring.writing():
            if made is not None:
                made.make()
            keyring.change_root(master)
    except BaseException:
        if made is not None:
            _take_back(keyring, before, made)
        raise
    if isinstance(master, KeyFile):
        drop_mark(master.path, before.keyring_id, before.epoch)


def _take_back(keyring: Keyring, before: HeadRow, made: NewMasterFile) -> None:
    """Remove a new key file unless the keyring is under it.

    That is in the keyring's file alone: an error may come after the commit. It is held meanwhile,
    so that no other rekey is under way with the same key file. If it cannot be held or read, the
    key file stays, with the mark by which the same call goes on.
    """
    with suppress(UserError, OSError), keyring.store.transaction(write=True):
        if keyring.store.head().root_wrap == before.root_wrap:
            made.remove()


def is_in_force(path: Path, master: KeyFile) -> bool:
    """Tell whether a rekey to this master got through, though it was killed before it said so.

    That it opens the keyring is not enough: who confuses two keyrings names a master in force, and
    would be told to destroy the other one's. The mark of that rekey must be there, and goes.
    """
    try:
        with Keyring.open(path, master) as keyring:
            head = keyring.head
    except KeyringError:
        return False
    return drop_mark(master.path, head.keyring_id, head.epoch - 1)


def backup(keyring: Keyring, path: Path, master: Master) -> int:
    """Copy the keyring to a new file and open every row of the copy once; return how many rows.

    Raises:
        KeyringExists: The target exists.
        KeyringCorrupt: A row of the copy does not open.
    """
    try:
        with new_private_file(path) as temporary:
            keyring.store.copy_to(temporary)
            with Keyring.open(temporary, master) as copy:
                for row in copy.rows:
                    if row.wrapped is not None:
                        copy.unwrap(row)
                    copy.label_of(row)
                return len(copy.rows)
    except FileExistsError:
        raise KeyringExists(f"{path} exists already; a backup never overwrites") from None


def _change(keyring: Keyring, subject: str, state: str, concerns: Callable[[KeyRow], bool]) -> int:
    """Bring the keys of a subject that are concerned into a state; return how many."""
    with keyring.writing():
        rows = [row for row in _rows_of(keyring, subject) if concerns(row)]
        if not rows:
            raise MissingKey(f"subject {subject!r} has no key that could become {state}")
        for row in rows:
            if state == "destroyed":
                tag = keyring.subject_tag(subject)  # the label that would tell of another is gone
                keyring.put(replace(row, state=state, label_ct=None, subject_tag=tag), None)
            else:
                keyring.put(replace(row, state=state), keyring.unwrap(row))
    return len(rows)


def _rows_of(keyring: Keyring, subject: str) -> list[KeyRow]:
    """Return a subject's rows.

    Raises:
        MissingKey: There are none.
    """
    rows = keyring.rows_of(subject)
    if not rows:
        raise MissingKey(
            f"no key of subject {subject!r} in this keyring; `keyring list` shows them"
        )
    return rows


def _info(keyring: Keyring, row: KeyRow) -> KeyInfo:
    """Return a row as `list` shows it."""
    return KeyInfo(
        subject=keyring.label_of(row),
        key_id=row.key_id.hex(),
        generation=row.generation,
        state=row.state,
        imported=bool(row.imported),
        created=datetime.date(1970, 1, 1) + datetime.timedelta(days=row.created_day),
    )


_MAGIC = b"ISEX\x01"


def export_subject(keyring: Keyring, subject: str, path: Path, passphrase: Passphrase) -> int:
    """Write a subject's usable keys to a new file; return how many.

    The locator key stays here: with it the receiver could sort everybody's files by person.

    Raises:
        MissingKey: The subject has no usable key.
        KeyringExists: The target exists.
    """
    passphrase.check_strength()
    keyring.refresh()
    rows = keyring.rows_of(subject)
    usable = [row for row in rows if row.state in ("active", "retired")]
    if not usable:
        raise MissingKey(f"subject {subject!r} has no usable key to export")
    keys = [{"key_id": row.key_id.hex(), "key": keyring.unwrap(row).hex()} for row in usable]
    content = {"subject": subject, "keys": keys}
    params, salt = str(passphrase.cost).encode(), random_key()
    head = _MAGIC + bytes([len(params)]) + params + salt
    key = passphrase.unlock(params.decode(), salt)
    try:
        write_new_private(path, head + seal(key, "export", head, json.dumps(content).encode()))
    except FileExistsError:
        raise KeyringExists(f"{path} exists already; an export never overwrites") from None
    return len(usable)


def import_subject(keyring: Keyring, path: Path, passphrase: Passphrase) -> tuple[str, int]:
    """Add the keys of an exported file; return (subject, number of keys that were new).

    They open files and never seal, whatever the file says of their origin: whoever made it knows
    them, and `revoke --undo` must not turn one of them into the key of new files.

    Raises:
        FormatError: It is not an export.
        WrongKey: The passphrase is not its own.
        Tampered: It was changed.
        DestroyedKey: One of its keys was destroyed here.
    """
    stored = read_private(path, "exported keys")
    head, params, salt = _split(stored)
    key = passphrase.unlock(params, salt)
    try:
        content = open_sealed(key, "export", head, stored[len(head) :])
    except WrongKey:
        raise WrongKey(f"the passphrase of {path} is another one") from None
    subject, keys = _checked(content)
    added = 0
    with keyring.writing():
        known = {row.key_id: row for row in keyring.rows}
        for key_id, key in keys:
            if key_id in known:
                if known[key_id].state == "destroyed":
                    raise DestroyedKey(
                        "a key of this export was destroyed here and stays destroyed"
                    )
                continue
            row = keyring.new_row(subject, "retired", key_id)
            keyring.put(replace(row, imported=1), key)
            added += 1
    return subject, added


def _split(stored: bytes) -> tuple[bytes, str, bytes]:
    """Return (head, parameters, salt) of an export."""
    start = len(_MAGIC) + 1
    if not stored.startswith(_MAGIC) or len(stored) < start:
        raise FormatError("not a file of exported keys", 0)
    end = start + stored[start - 1]
    head = stored[: end + KDF_SALT_BYTES]
    try:
        params = str(Argon2Cost.parse(stored[start:end].decode("ascii")))
    except ValueError:
        raise FormatError("the passphrase parameters of the export are damaged", start) from None
    if len(head) < end + KDF_SALT_BYTES:
        raise FormatError("truncated inside the salt", len(stored))
    return head, params, head[end:]


def _checked(opened: bytes) -> tuple[str, list[tuple[bytes, bytes]]]:
    """Return (subject, keys) of an authenticated export; its sender may wish us ill."""
    try:
        content = json.loads(opened)
        keys = [(bytes.fromhex(k["key_id"]), bytes.fromhex(k["key"])) for k in content["keys"]]
        subject = str(content["subject"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise Tampered("the export does not hold what this program writes") from None
    if any(len(key_id) != LOCATOR_BYTES or len(key) != KEY_BYTES for key_id, key in keys):
        raise Tampered("the export holds keys of the wrong length")
    return subject, keys
