"""Erasure of keys: by their age, and with a signed certificate of what was destroyed.

A certificate is written after the destruction is on the disk, from the tombstones and the files
that exist then. A process that is killed in between leaves no certificate, and the same command
writes it. So a certificate never states more than what happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from engine.vault.audit_reader import AuditLog
from engine.vault.keyring import Keyring
from engine.vault.keyring_admin import destroy
from engine.vault.keyring_rows import KeyRow
from engine.vault.keyring_store import today
from engine.vault.reading import key_id_of
from engine.vault.sealed_folder import SEALED_SUFFIX
from engine.vault.secret_files import write_new_private
from modeling.encryption.ised_errors import (
    FormatError,
    IsedError,
    KeyringCorrupt,
    StorageError,
    Tampered,
    UsageError,
)
from modeling.encryption.sealed_original import ORIGINAL_SUFFIX
from utils.files import read_at_most
from utils.logger import Progress

Statement = dict[str, Any]

CONFIRMED = "confirmed"  # result in the audit log: a person answered the question of `expire`
_TOLERANCE = timedelta(hours=1)  # that the clock may be set back
_LEAST_PAUSE_DAYS = 7

_SUFFIXES = (SEALED_SUFFIX, ORIGINAL_SUFFIX)
_FORMAT = "securereid/erasure/1"
_MAX_CERTIFICATE_BYTES = 1 << 28
_CLAIM = (
    "The keys listed here were destroyed in this keyring, at the latest at the time stated. The "
    "files listed here were sealed under these keys; this keyring cannot open them any longer."
)
_NOT_GUARANTEED = (
    "Backups and other copies of the keyring, made before the destruction, contain the keys as "
    "long as a master exists that opens them.",
    "Exports of the keys, and keyrings into which they were imported, open the files.",
    "Images that were opened, recovered or revealed before, and the sources, are not affected.",
    "Checkpoints trained on the images are not affected.",
    "Files in other folders, or copied there, are destroyed too, but not listed.",
    "Files sealed under a key that was imported from another keyring are not listed.",
)


def expired(keyring: Keyring, days: int, by: str) -> tuple[list[KeyRow], list[KeyRow]]:
    """Return the rows of the keys that are older than a number of days: usable, and revoked ones.

    ``by`` is `used` to count the age from the last use to seal: no file younger than this is lost.
    It is `created` to count from the creation: no file older than this remains.
    """
    keyring.refresh()
    first = today() - days
    rows = [row for row in keyring.rows if getattr(row, f"{by}_day") < first]
    usable = [row for row in rows if row.state in ("active", "retired")]
    return usable, [row for row in rows if row.state == "revoked"]


def clock_problem(keyring: Keyring, days: int) -> str:
    """Return why keys of an age may be younger than by this clock, or ''.

    If the clock is or was wrong, `expire` destroys keys too early, or the age of keys is wrong. The
    times in the audit log show it: a step back, or a long time without any command, which may be a
    step forward. A log that was set aside cannot show it. Commands before the last `CONFIRMED` one
    are not examined. The log contains the beginning of this command.
    """
    problem, last = "", None
    for entry in AuditLog(keyring):
        time = datetime.fromisoformat(entry["time"])
        if entry.get("result") == CONFIRMED:
            problem = ""
        elif not problem and entry["event"] == "restart":
            problem = f"the audit log before {time:%Y-%m-%d} was set aside"
        elif not problem and last is not None:
            if last - time > _TOLERANCE:
                problem = f"the clock went back from {last:%Y-%m-%d} to {time:%Y-%m-%d}"
            elif (time - last).days > max(_LEAST_PAUSE_DAYS, days // 4):
                problem = f"no command used the keyring from {last:%Y-%m-%d} to {time:%Y-%m-%d}"
        last = time
    return problem


def expire(keyring: Keyring, days: int, by: str, listed: Collection[bytes]) -> int:
    """Destroy the keys with the listed ids that are still `expired`; return how many.

    A key may have been used since it was listed. All are destroyed in one transaction. Revoked keys
    stay: a person suspended their use and has to decide. The tombstones get a random tag, which no
    label has, so a subject that appears again gets a new key. After `destroy` it would not, also
    if `rotate` made the expired key after that: the earlier tombstones keep their tag.
    """
    tags: dict[bytes, bytes] = {}
    with keyring.writing():
        rows = [row for row in expired(keyring, days, by)[0] if row.key_id in listed]
        for row in rows:
            tag = tags.setdefault(row.subject_tag, os.urandom(32))
            keyring.put(replace(row, state="destroyed", label_ct=None, subject_tag=tag), None)
    return len(rows)


def destroy_with_certificate(
    keyring: Keyring,
    subjects: Sequence[str],
    folders: Sequence[Path],
    path: Path,
    purpose: str | None = None,
) -> tuple[int, Statement]:
    """Destroy the keys of subjects and write a certificate; a repeated call completes it.

    The keys are those of one purpose, or all; all are destroyed or none. The certificate lists the
    files under these keys in sealed folders. If its path exists, it must be that of this
    destruction.

    Returns:
        Number of keys destroyed by this call, and the statement of the certificate.

    Raises:
        MissingKey: The keyring has never had such a key of one of the subjects.
        UsageError: A folder cannot be read, or the path cannot be used. Nothing was destroyed.
        StorageError: The certificate cannot be written. The keys were destroyed.
    """
    folders = list(dict.fromkeys(folders))
    checks = [(folder, os.R_OK, "read") for folder in folders]
    for folder, access, verb in (*checks, (path.parent, os.W_OK, "written to")):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; nothing was destroyed")
        if not os.access(folder, access | os.X_OK):
            raise UsageError(f"{folder} cannot be {verb}; nothing was destroyed")

    def rows() -> list[KeyRow]:
        every = {row.key_id: row for name in subjects for row in keyring.rows_of(name, purpose)}
        return [every[key_id] for key_id in sorted(every)]

    keyring.refresh()
    if os.path.lexists(path):
        return 0, _completed(keyring, rows(), folders, path)
    count = destroy(keyring, *subjects, purpose=purpose)
    destroyed = [row for row in rows() if row.state == "destroyed"]
    try:
        content, statement = _certificate(keyring, destroyed, folders)
        write_new_private(path, content)
    except FileExistsError:  # another process wrote it meanwhile
        return count, _completed(keyring, rows(), folders, path)
    except (StorageError, OSError) as error:
        raise StorageError(
            f"the keys were destroyed, but there is no certificate ({error}); run the same command "
            "again to write it"
        ) from None
    return count, statement


def public_key(keyring: Keyring) -> bytes:
    """Return the key that certificates of a keyring are verified with (Ed25519, 32 bytes)."""
    return keyring.signing_key().public_key().public_bytes_raw()


def read_certificate(path: Path, key: bytes) -> Statement:
    """Return the statement of a certificate, given the file and the public key of its keyring.

    Raises:
        UsageError: The file cannot be read.
        FormatError, Tampered: See `parse_certificate`.
    """
    try:
        content = read_at_most(path, _MAX_CERTIFICATE_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    return parse_certificate(content or b"", key, str(path))


def parse_certificate(content: bytes, key: bytes, name: str = "the certificate") -> Statement:
    """Return the statement of a certificate, given its content and the public key.

    Raises:
        FormatError: It is not a certificate.
        Tampered: It was changed, or signed by another keyring.
    """
    try:
        parsed = json.loads(content)
        statement, signature = parsed["statement"], bytes.fromhex(parsed["signature"])
        if statement["format"] != _FORMAT:
            raise ValueError
        is_exact = content == _file(statement, signature)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise FormatError(f"{name} is not a certificate of this program") from None
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _signed(statement))
    except InvalidSignature:
        is_exact = False
    if not is_exact:
        raise Tampered(f"{name} was changed, or signed by another keyring")
    return dict(statement)


def verify_certificate(keyring: Keyring, path: Path) -> Statement:
    """Return the statement of a certificate of this keyring, after checking the keys in it.

    Raises:
        UsageError, FormatError, Tampered: See `read_certificate`.
        KeyringCorrupt: A key that it lists is not destroyed: the keyring was restored from a
            backup.
    """
    statement = read_certificate(path, public_key(keyring))
    rows = [keyring.row(bytes.fromhex(key["id"])) for key in statement["keys"]]
    back = sum(row is None or row.state != "destroyed" for row in rows)
    if back:
        raise KeyringCorrupt(
            f"{back} of the {len(rows)} keys in {path} are not destroyed in {keyring.store.path}: "
            "it is an older copy of the keyring; destroy the keys again"
        )
    return statement


def _completed(
    keyring: Keyring, rows: Iterable[KeyRow], folders: Sequence[Path], path: Path
) -> Statement:
    """Return the statement of an existing certificate, which must be that of this destruction."""
    with suppress(FormatError, Tampered, KeyringCorrupt):
        statement = verify_certificate(keyring, path)
        listed = [folder["path"] for folder in statement["folders"]]
        if statement["keys"] == _keys(rows) and listed == list(map(str, folders)):
            return statement
    raise UsageError(
        f"{path} exists already and is not the certificate of this destruction; give another file"
    )


def _keys(rows: Iterable[KeyRow]) -> list[dict[str, str]]:
    return [{"id": row.key_id.hex(), "purpose": row.purpose} for row in rows]


def _certificate(
    keyring: Keyring, rows: Sequence[KeyRow], folders: Sequence[Path]
) -> tuple[bytes, Statement]:
    """Return the file and the statement about destroyed keys."""
    key_ids = {row.key_id for row in rows}
    statement = {
        "format": _FORMAT,
        "keyring": keyring.head.keyring_id.hex(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "claim": _CLAIM,
        "keys": _keys(rows),
        "folders": [_files_under(folder, keyring, key_ids) for folder in folders],
        "not_guaranteed": list(_NOT_GUARANTEED),
    }
    return _file(statement, keyring.signing_key().sign(_signed(statement))), statement


def _files_under(folder: Path, keyring: Keyring, key_ids: Collection[bytes]) -> dict[str, Any]:
    """Return the names of the files under some keys, and of those whose key is unknown."""
    files, unknown = [], []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(_SUFFIXES)]
    names = sorted(name for name in names if not name.startswith("."))
    for name in Progress.over(names, "List files", unit="file"):
        try:
            if key_id_of(folder / name, keyring) in key_ids:
                files.append(name)
        except IsedError as error:
            error.of_one_file()
            unknown.append(name)
    return {"path": str(folder), "files": files, "unknown_key": unknown}


def _signed(statement: Statement) -> bytes:
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()


def _file(statement: Statement, signature: bytes) -> bytes:
    """Return the content of the file; a reader accepts no other form of it."""
    content = {"statement": statement, "signature": signature.hex()}
    return json.dumps(content, indent=1).encode() + b"\n"
