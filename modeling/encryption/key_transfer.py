"""One person's keys in a file under a passphrase, to open that person's pictures elsewhere.

::

    "ISEX" | version 1 | length of the parameters, 1 byte | Argon2id parameters | salt, 32 bytes |
    SEAL(key from the passphrase, "export", aad = everything before, JSON)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from modeling.encryption.errors import (
    DestroyedKey,
    FormatError,
    KeyringExists,
    MissingKey,
    Tampered,
    WrongKey,
)
from modeling.encryption.keyring import Keyring
from modeling.encryption.master import KDF_SALT_BYTES, Argon2Cost, Passphrase
from modeling.encryption.picture import LOCATOR_BYTES
from modeling.encryption.primitives import KEY_BYTES, open_sealed, random_key, seal
from modeling.encryption.secret_files import read_private, write_new_private

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
