"""The master of a keyring, the root key that it wraps, and the change to a new master key file.

The master is a key file of 32 bytes or its shares, a passphrase stretched by Argon2id, or a random
key that an external command wraps (docs/OPERATING.md).
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

from engine.vault.keyring_rows import FORMAT, IMAGE, HeadRow, KeyRow
from engine.vault.secret_files import read_private, write_new_private
from engine.vault.shares import read_key
from engine.vault.wrap_command import KDF_COMMAND, WrapCommand
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
from utils.files import remove_leftovers, sync_folder

KDF_FILE = "file"
KDF_ARGON2ID = "argon2id"
KDF_SALT_BYTES = 32
MIN_PASSPHRASE_CHARS = 8

_PARAMS = re.compile(r"m=(\d{1,8}),t=(\d{1,3}),p=(\d{1,3})")
# Version of the root's wrap. Not the format of the keyring, whose conversion keeps the wrap.
_ROOT_VERSION = 1


@dataclass(frozen=True)
class Argon2Limits:
    """Bounds of stored Argon2id parameters, checked before memory or time is spent."""

    # smallest and largest value
    memory_kib: tuple[int, int]
    iterations: tuple[int, int]
    lanes: tuple[int, int]


KEYRING_LIMITS = Argon2Limits((8 * 1024, 4 * 1024 * 1024), (1, 64), (1, 64))
# An export may come from anyone, and its parameters are used before it is authenticated.
EXPORT_LIMITS = Argon2Limits((8 * 1024, 512 * 1024), (1, 8), (1, 8))


@dataclass(frozen=True)
class Argon2Cost:
    """Cost of one guess at a passphrase."""

    memory_kib: int = 256 * 1024  # 256 MiB
    iterations: int = 3  # passes over the memory
    lanes: int = 4

    def __str__(self) -> str:
        """Return the stored form."""
        return f"m={self.memory_kib},t={self.iterations},p={self.lanes}"

    @classmethod
    def parse(cls, text: str, limits: Argon2Limits = KEYRING_LIMITS) -> Argon2Cost:
        """Parse a stored form.

        Raises:
            KeyringCorrupt: The text is malformed or a number is out of bounds.
        """
        match = _PARAMS.fullmatch(text)
        if match is None:
            raise KeyringCorrupt(f"passphrase parameters {text!a} are not m=..,t=..,p=..")
        cost = cls(*(int(number) for number in match.groups()))
        for name, value, (low, high) in (
            ("m", cost.memory_kib, limits.memory_kib),
            ("t", cost.iterations, limits.iterations),
            ("p", cost.lanes, limits.lanes),
        ):
            if not low <= value <= high:
                raise KeyringCorrupt(
                    f"passphrase parameter {name}={value}; allowed {low} to {high}"
                )
        return cost


@dataclass(frozen=True)
class KeyFile:
    """A master key in a file of 32 random bytes that only its owner may read."""

    path: Path
    kdf: ClassVar[str] = KDF_FILE

    def create_if_missing(self) -> None:
        """Write a new random key unless the file exists. Concurrent processes get the same key."""
        if not self.path.exists() and not self.path.is_symlink():
            try:
                write_new_private(self.path, random_key())
            except FileExistsError:
                return

    def new_key(self) -> tuple[str, bytes, bytes]:
        """Return parameters and data to store for a new keyring, and the master key."""
        return "", b"", self.unlock("", b"")

    def unlock(self, params: str, data: bytes) -> bytes:
        """Return the master key.

        Raises:
            KeyringMissing, InsecurePermissions: The file does not exist or is not private.
            WrongMaster: It does not contain 32 bytes.
        """
        del params, data  # a random key needs no stretching
        # A leftover with the same content would survive the destruction of the key file.
        remove_leftovers(self.path.parent, self.path.name)
        key = read_private(self.path, "master key file")
        if len(key) != KEY_BYTES:
            raise WrongMaster(
                f"master key file {self.path} has {len(key)} bytes; expected {KEY_BYTES}"
            )
        return key


@dataclass(frozen=True, repr=False)
class Passphrase:
    """A master key that Argon2id derives from a passphrase."""

    # the passphrase, at least 8 characters. Kept in Unicode form NFC, since systems differ in how
    # they encode an accent that is typed.
    text: str
    # cost of a guess, for a new keyring. An existing keyring stores its own.
    cost: Argon2Cost = field(default_factory=Argon2Cost)
    kdf: ClassVar[str] = KDF_ARGON2ID

    def __post_init__(self) -> None:
        """Normalise the text."""
        object.__setattr__(self, "text", unicodedata.normalize("NFC", self.text))

    def __repr__(self) -> str:
        """Keep the passphrase out of logs."""
        return "Passphrase(...)"

    def new_key(self) -> tuple[str, bytes, bytes]:
        """Return parameters and data to store for a new keyring, and the master key.

        Raises:
            UsageError: The passphrase is too short.
        """
        self.check_strength()
        params, salt = str(self.cost), os.urandom(KDF_SALT_BYTES)
        return params, salt, self.unlock(params, salt)

    def check_strength(self) -> None:
        """Raise if the passphrase is too short for a new keyring or export.

        Raises:
            UsageError: It has fewer than 8 characters.
        """
        if len(self.text) < MIN_PASSPHRASE_CHARS:
            raise UsageError(
                f"the passphrase has {len(self.text)} characters; at least {MIN_PASSPHRASE_CHARS} "
                "are required"
            )

    def unlock(self, params: str, data: bytes) -> bytes:
        """Return the master key for stored parameters and salt.

        Raises:
            KeyringCorrupt: The parameters are out of bounds.
            StorageError: There is not enough memory.
            UsageError: The passphrase is not UTF-8.
        """
        cost = Argon2Cost.parse(params)
        if len(data) != KDF_SALT_BYTES:
            raise KeyringCorrupt(f"passphrase salt of {len(data)} bytes; expected {KDF_SALT_BYTES}")
        try:
            return Argon2id(
                salt=data,
                length=KEY_BYTES,
                iterations=cost.iterations,
                lanes=cost.lanes,
                memory_cost=cost.memory_kib,
            ).derive(self.text.encode())
        except MemoryError:
            raise StorageError(
                f"the passphrase needs {cost.memory_kib >> 10} MiB of memory, which is not "
                "available; free some, or use a master key file"
            ) from None
        except UnicodeEncodeError:
            raise UsageError("the passphrase is not UTF-8") from None


@dataclass(frozen=True)
class KeyShares:
    """A master key file of which several people have shares (`keyring shares create`)."""

    paths: tuple[Path, ...]  # files of the shares, as many as are needed
    kdf: ClassVar[str] = KDF_FILE

    def new_key(self) -> tuple[str, bytes, bytes]:
        """Return parameters and data to store for a new keyring, and the master key."""
        return "", b"", self.unlock("", b"")

    def unlock(self, params: str, data: bytes) -> bytes:
        """Return the master key; it is never written to a file.

        Raises:
            KeyringMissing, InsecurePermissions, FormatError, UsageError, Tampered: See `read_key`.
        """
        del params, data
        return read_key(self.paths)


Master = KeyFile | KeyShares | Passphrase | WrapCommand

_NEEDED = {
    KDF_FILE: "a master key file (--master) or its shares (--share)",
    KDF_ARGON2ID: "a passphrase",
    KDF_COMMAND: "a command (--unwrap-command)",
}


def unlock_root(head: HeadRow, master: Master, path: Path) -> bytes:
    """Return the root key of the keyring at a path.

    Raises:
        WrongMaster: The master does not belong to this keyring.
        KeyringCorrupt: The head was edited.
    """
    if head.kdf != master.kdf:
        raise WrongMaster(f"{path} is opened by {_NEEDED[head.kdf]}")
    master_key = master.unlock(head.kdf_params, head.kdf_data)
    try:
        return open_sealed(master_key, "root", _root_aad(head), head.root_wrap)
    except WrongKey:
        raise WrongMaster(
            f"the master key or passphrase is not that of {path}; give the master from `init`, or "
            "from the last `rekey`"
        ) from None
    except Tampered:
        raise KeyringCorrupt(f"the head of {path} was edited; restore a backup") from None


def new_root(keyring_id: bytes, master: Master, epoch: int) -> tuple[bytes, HeadRow]:
    """Return a new root key and the head row that wraps it under the master."""
    params, data, master_key = master.new_key()
    head = HeadRow(FORMAT, keyring_id, master.kdf, params, data, b"", epoch, b"")
    root = random_key()
    wrap = seal(master_key, "root", _root_aad(head), root)
    return root, replace(head, root_wrap=wrap)


def unwrap(key: bytes, context: str, aad: bytes, wrapped: bytes) -> bytes:
    """Open a wrap that the keyring stores.

    Raises:
        KeyringCorrupt: It was edited.
    """
    try:
        return open_sealed(key, context, aad, wrapped)
    except AuthenticationError:
        raise KeyringCorrupt(f"a {context} of the keyring was edited; restore a backup") from None


def _root_aad(head: HeadRow) -> bytes:
    """Return the bytes that the wrap of the root is bound to."""
    kdf = (head.kdf.encode(), head.kdf_params.encode(), head.kdf_data)
    fields = (_ROOT_VERSION.to_bytes(4, "big"), head.keyring_id, *kdf)
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def service_aad(head: HeadRow, name: str) -> bytes:
    """Return the bytes that the wrap of a service key is bound to."""
    return head.keyring_id + name.encode()


def row_aad(keyring_id: bytes, row: KeyRow) -> bytes:
    """Return the bytes that the wrap of a key is bound to.

    Those of an image key are the same in all formats, so a conversion wraps no key again.
    """
    position = keyring_id + row.key_id + row.subject_tag + row.generation.to_bytes(8, "big")
    state = row.state if row.purpose == IMAGE else f"{row.state}/{row.purpose}"
    return position + bytes([row.imported]) + state.encode()


class NewMasterFile:
    """The new master key file of a rekey, with a mark until the keyring is under it.

    If `rekey` fails, both are deleted. If it was killed, the next call resumes: the mark contains
    the keyring's id, its epoch, which every rekey raises, and a hash of the key. A key file whose
    mark matches the present keyring is thus of a rekey that was not committed. A former master, or
    a file of another origin, does not match. Use this while the keyring is held for writing.
    """

    def __init__(self, path: Path, head: HeadRow) -> None:
        """Check the path of the new file against the keyring's head before the rekey.

        Raises:
            UsageError: The file exists, and is not from a killed rekey of this keyring.
        """
        self._path, self._mark = path, mark_of(path)
        self._keyring_id, self._epoch = head.keyring_id, head.epoch
        self._written: dict[Path, bytes] = {}  # content, recorded before each file is written
        self._is_leftover()

    def make(self) -> None:
        """Write the mark and the key file, unless a killed rekey did.

        Raises:
            UsageError: The file exists.
            StorageError: It cannot be written.
        """
        if self._is_leftover():
            return
        key = random_key()
        self._written = {self._path: key, self._mark: claim_of(key, self._keyring_id, self._epoch)}
        try:
            self._mark.unlink(missing_ok=True)  # from a rekey that was killed before its key file
            write_new_private(self._mark, self._written[self._mark])
            write_new_private(self._path, key)
        except FileExistsError:  # another process wrote it meanwhile
            raise _exists(self._path) from None
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from None

    def remove(self) -> None:
        """Delete the files that this run wrote; only if the keyring is not under the new key."""
        for path, content in self._written.items():
            if _content(path) == content:
                path.unlink(missing_ok=True)
        if self._written:
            sync_folder(self._path.parent)

    def _is_leftover(self) -> bool:
        """Return whether the file exists and is from a killed rekey of this keyring.

        Raises:
            UsageError: It exists and has another origin.
        """
        if not os.path.lexists(self._path):
            return False
        if not is_claimed(self._path, self._keyring_id, self._epoch):
            raise _exists(self._path)
        return True


def mark_of(path: Path) -> Path:
    """Return the path of the mark of a new master key file."""
    return path.with_name(f".{path.name}.rekey")


def claim_of(key: bytes, keyring_id: bytes, epoch: int) -> bytes:
    """Return the content of the mark of a new master key for a keyring at an epoch."""
    digest = hashlib.sha256(b"ised rekey" + key).hexdigest()
    return f"{keyring_id.hex()} {epoch} {digest}\n".encode()


def is_claimed(path: Path, keyring_id: bytes, epoch: int) -> bool:
    """Return whether a key file is from a rekey of this keyring that began at this epoch."""
    key = _content(path)
    return key is not None and _content(mark_of(path)) == claim_of(key, keyring_id, epoch)


def drop_mark(path: Path, keyring_id: bytes, epoch: int) -> bool:
    """Delete the mark of a committed rekey; return False if it has no mark."""
    if not is_claimed(path, keyring_id, epoch):
        return False
    mark_of(path).unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _content(path: Path) -> bytes | None:
    """Return the content of a private file; None if it is missing, a link or a pipe."""
    with suppress(UserError, OSError):
        return read_private(path, "new master key file")
    return None


def _exists(path: Path) -> UsageError:
    return UsageError(f"{path} exists already; give another file name for the new master key")
