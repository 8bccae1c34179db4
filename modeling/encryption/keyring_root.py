"""The root of a keyring: unlocked by the master, wraps every row, each bound to its place."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from modeling.encryption.errors import (
    AuthenticationError,
    KeyringCorrupt,
    Tampered,
    WrongKey,
    WrongMaster,
)
from modeling.encryption.keyring_rows import HeadRow, KeyRow
from modeling.encryption.keyring_store import FORMAT
from modeling.encryption.master import KDF_ARGON2ID, KDF_SALT_BYTES, KeyFile, Master
from modeling.encryption.primitives import open_sealed, random_key, seal


def unlock_root(head: HeadRow, master: Master, path: Path) -> bytes:
    """Return the root key of the keyring in a file.

    Raises:
        WrongMaster: The master is not this keyring's.
        KeyringCorrupt: The head row was edited.
    """
    if head.format != FORMAT:
        raise KeyringCorrupt(f"keyring format {head.format}; this program reads {FORMAT}")
    if head.kdf != master.kdf:
        needs = "a passphrase" if head.kdf == KDF_ARGON2ID else "a master key file"
        raise WrongMaster(f"{path} is opened by {needs}")
    master_key = master.unlock(head.kdf_params, head.kdf_salt)
    try:
        return open_sealed(master_key, "root", _head_aad(head), head.root_wrap)
    except WrongKey:
        raise WrongMaster(
            f"the master key or passphrase is not that of {path}; give the one it was made with, "
            "or last rekeyed to"
        ) from None
    except Tampered:
        raise KeyringCorrupt("the keyring's head was edited; restore a backup") from None


def new_root(keyring_id: bytes, master: Master, epoch: int) -> tuple[bytes, HeadRow]:
    """Return a new root key and the head row that wraps it."""
    if isinstance(master, KeyFile):
        params, salt = "", b""
    else:
        master.check_strength()
        params, salt = str(master.cost), os.urandom(KDF_SALT_BYTES)
    head = HeadRow(FORMAT, keyring_id, master.kdf, params, salt, b"", epoch, b"")
    root = random_key()
    wrap = seal(master.unlock(params, salt), "root", _head_aad(head), root)
    return root, replace(head, root_wrap=wrap)


def opened(key: bytes, context: str, aad: bytes, wrapped: bytes) -> bytes:
    """Open something that the authenticated table holds."""
    try:
        return open_sealed(key, context, aad, wrapped)
    except AuthenticationError:
        raise KeyringCorrupt(f"a {context} of the keyring was edited; restore a backup") from None


def _head_aad(head: HeadRow) -> bytes:
    """Return what the root's wrap is bound to."""
    kdf = (head.kdf.encode(), head.kdf_params.encode(), head.kdf_salt)
    fields = (head.format.to_bytes(4, "big"), head.keyring_id, *kdf)
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def service_aad(head: HeadRow, name: str) -> bytes:
    """Return what a service key's wrap is bound to."""
    return head.keyring_id + name.encode()


def row_aad(keyring_id: bytes, row: KeyRow) -> bytes:
    """Return what a key's wrap is bound to."""
    place = keyring_id + row.key_id + row.subject_tag + row.generation.to_bytes(8, "big")
    return place + bytes([row.imported]) + row.state.encode()
