"""The master secret of a keyring: a 32-byte key file, or a passphrase through Argon2id.

The root of a keyring: unlocked by the master, wraps every row, each bound to its place.

The key file that a rekey makes: gone if the rekey fails, gone on with if it was killed.

A mark lies beside the file until the keyring is under it. It names the keyring, its epoch, which
every rekey raises, and the key by a hash: who has the keyring open at that epoch, and finds mark
and file to agree, knows the file to be that of a rekey that did not get through. A former master,
or a file that somebody else put there, does not agree.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from engine.vault.keyring_store import FORMAT, HeadRow, KeyRow
from engine.vault.secret_files import read_private, sync_folder, write_new_private
from modeling.encryption.ised_errors import (
    AuthenticationError,
    KeyringCorrupt,
    StorageError,
    Tampered,
    UsageError,
    WrongKey,
    WrongMaster,
)
from modeling.encryption.primitives import KEY_BYTES, open_sealed, random_key, seal
from utils.errors import UserError
from utils.files import remove_leftovers

KDF_FILE = "file"
KDF_ARGON2ID = "argon2id"
KDF_SALT_BYTES = 32
MIN_PASSPHRASE_CHARS = 8

_MEMORY_KIB = (8 * 1024, 4 * 1024 * 1024)
_ITERATIONS = (1, 64)
_LANES = (1, 64)
_PARAMS = re.compile(r"m=(\d{1,8}),t=(\d{1,3}),p=(\d{1,3})")


@dataclass(frozen=True)
class Argon2Cost:
    """Cost of one guess at a passphrase.

    Attributes:
        memory_kib: Memory in KiB; 256 MiB by default.
        iterations: Passes over it.
        lanes: Independent lanes.
    """

    memory_kib: int = 256 * 1024
    iterations: int = 3
    lanes: int = 4

    def __str__(self) -> str:
        """Return the stored form."""
        return f"m={self.memory_kib},t={self.iterations},p={self.lanes}"

    @classmethod
    def parse(cls, text: str) -> Argon2Cost:
        """Read a stored form; bounds are checked before any memory is taken.

        Raises:
            KeyringCorrupt: It is none, or asks for too little or too much.
        """
        match = _PARAMS.fullmatch(text)
        if match is None:
            raise KeyringCorrupt(f"passphrase parameters {text!a} are not m=..,t=..,p=..")
        cost = cls(*(int(number) for number in match.groups()))
        cost.check()
        return cost

    def check(self) -> None:
        """Refuse values outside sane bounds.

        Raises:
            KeyringCorrupt: A value is out of bounds.
        """
        for name, value, (low, high) in (
            ("m", self.memory_kib, _MEMORY_KIB),
            ("t", self.iterations, _ITERATIONS),
            ("p", self.lanes, _LANES),
        ):
            if not low <= value <= high:
                raise KeyringCorrupt(
                    f"passphrase parameter {name}={value}; allowed {low} to {high}"
                )


@dataclass(frozen=True)
class KeyFile:
    """A master key in a file of 32 random bytes that only its owner may read.

    Attributes:
        path: The file.
    """

    path: Path
    kdf: ClassVar[str] = KDF_FILE

    def create_if_missing(self) -> None:
        """Write a new random key unless the file exists; two processes end with the same key."""
        if not self.path.exists() and not self.path.is_symlink():
            try:
                write_new_private(self.path, random_key())
            except FileExistsError:
                return

    def unlock(self, params: str, salt: bytes) -> bytes:
        """Return the master key.

        Raises:
            KeyringMissing, InsecurePermissions: The file is not there or not private.
            WrongMaster: It does not hold 32 bytes.
        """
        del params, salt  # a random key needs no stretching
        remove_leftovers(self.path.parent, self.path.name)  # or it outlives the file's destruction
        key = read_private(self.path, "master key file")
        if len(key) != KEY_BYTES:
            raise WrongMaster(
                f"master key file {self.path} has {len(key)} bytes; expected {KEY_BYTES}"
            )
        return key


@dataclass(frozen=True, repr=False)
class Passphrase:
    """A master key that Argon2id makes from something a person remembers.

    Attributes:
        text: The passphrase, at least 8 characters; kept in Unicode form NFC, since systems differ
            in how they write an accent that is typed.
        cost: Cost of a guess, for a new keyring; an existing one says its own.
    """

    text: str
    cost: Argon2Cost = field(default_factory=Argon2Cost)
    kdf: ClassVar[str] = KDF_ARGON2ID

    def __post_init__(self) -> None:
        """Bring the text to its one form."""
        object.__setattr__(self, "text", unicodedata.normalize("NFC", self.text))

    def __repr__(self) -> str:
        """Keep the passphrase out of logs."""
        return "Passphrase(...)"

    def check_strength(self) -> None:
        """Refuse a passphrase for a new keyring that is too short to be one.

        Raises:
            UsageError: It has fewer than 8 characters.
        """
        if len(self.text) < MIN_PASSPHRASE_CHARS:
            raise UsageError(
                f"passphrase of {len(self.text)} characters; at least {MIN_PASSPHRASE_CHARS}"
            )

    def unlock(self, params: str, salt: bytes) -> bytes:
        """Return the master key for stored parameters.

        Raises:
            KeyringCorrupt: The parameters are out of bounds.
            StorageError: There is too little memory.
            UsageError: The passphrase is not UTF-8.
        """
        cost = Argon2Cost.parse(params)
        if len(salt) != KDF_SALT_BYTES:
            raise KeyringCorrupt(f"passphrase salt of {len(salt)} bytes; expected {KDF_SALT_BYTES}")
        try:
            return Argon2id(
                salt=salt,
                length=KEY_BYTES,
                iterations=cost.iterations,
                lanes=cost.lanes,
                memory_cost=cost.memory_kib,
            ).derive(self.text.encode())
        except MemoryError:
            raise StorageError(
                f"the passphrase needs {cost.memory_kib >> 10} MiB of memory, which is not there; "
                "free some, or use a master key file"
            ) from None
        except UnicodeEncodeError:
            raise UsageError("the passphrase is not UTF-8") from None


Master = KeyFile | Passphrase


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


class NewMasterFile:
    """A master key file on its way into force; used while the keyring is held for writing."""

    def __init__(self, path: Path, head: HeadRow) -> None:
        """Take the new file's path, and the keyring's head as it is before.

        Raises:
            UsageError: The file exists, and is not of a killed rekey of this keyring.
        """
        self._path, self._mark = path, mark_of(path)
        self._keyring_id, self._epoch = head.keyring_id, head.epoch
        self._made: dict[Path, bytes] = {}  # what this run wrote, or was about to
        self._is_leftover()

    def make(self) -> None:
        """Write the mark and the file, unless a killed rekey did.

        Raises:
            UsageError: The file exists.
            StorageError: It cannot be written.
        """
        if self._is_leftover():
            return
        key = random_key()
        self._made = {self._path: key, self._mark: claim_of(key, self._keyring_id, self._epoch)}
        try:
            self._mark.unlink(missing_ok=True)  # of a rekey killed before it wrote its key
            write_new_private(self._mark, self._made[self._mark])
            write_new_private(self._path, key)
        except FileExistsError:  # somebody was quicker, and it is theirs
            raise _exists(self._path) from None
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from None

    def remove(self) -> None:
        """Take back what this run made; only where the keyring is known not to be under it."""
        for path, content in self._made.items():
            if _content(path) == content:
                path.unlink(missing_ok=True)
        if self._made:
            sync_folder(self._path.parent)

    def _is_leftover(self) -> bool:
        """Whether the file is there, of a killed rekey of this keyring.

        Raises:
            UsageError: It is there, and is none.
        """
        if not os.path.lexists(self._path):
            return False
        if not is_claimed(self._path, self._keyring_id, self._epoch):
            raise _exists(self._path)
        return True


def mark_of(path: Path) -> Path:
    """Return where the mark of a new master key file lies."""
    return path.with_name(f".{path.name}.rekey")


def claim_of(key: bytes, keyring_id: bytes, epoch: int) -> bytes:
    """Return the content of the mark of a new master key for a keyring at an epoch."""
    digest = hashlib.sha256(b"ised rekey" + key).hexdigest()
    return f"{keyring_id.hex()} {epoch} {digest}\n".encode()


def is_claimed(path: Path, keyring_id: bytes, epoch: int) -> bool:
    """Tell whether a key file is of a rekey of this keyring that began at this epoch."""
    key = _content(path)
    return key is not None and _content(mark_of(path)) == claim_of(key, keyring_id, epoch)


def drop_mark(path: Path, keyring_id: bytes, epoch: int) -> bool:
    """Remove the mark of a rekey that got through; False, and nothing, if it is of another."""
    if not is_claimed(path, keyring_id, epoch):
        return False
    mark_of(path).unlink(missing_ok=True)
    return True


def _content(path: Path) -> bytes | None:
    """Return what a private file holds; None where there is none, also for links and pipes."""
    with suppress(UserError, OSError):
        return read_private(path, "new master key file")
    return None


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists already; name a file for the new master key")
