"""The master of a keyring, the root key that it wraps, and the change to a new master key file.

The master is a key file of 32 bytes or its shares, a passphrase stretched by Argon2id, or a random
key that an external command wraps: a key service, a smart card, the machine's TPM
(docs/OPERATING.md has examples).
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from engine.vault.keyring_rows import FORMAT, IMAGE, KDFS, HeadRow, KeyRow
from engine.vault.secret_files import read_private, write_new_private
from engine.vault.shares import read_key
from modeling.encryption.ised_errors import (
    AuthenticationError,
    KeyringCorrupt,
    KeyringError,
    StorageError,
    Tampered,
    UsageError,
    WrongKey,
    WrongMaster,
)
from modeling.encryption.primitives import KEY_BYTES, open_sealed, random_key, seal
from utils.errors import UserError
from utils.files import remove_leftovers, sync_folder

KDF_FILE, KDF_ARGON2ID, KDF_COMMAND = KDFS
KDF_SALT_BYTES = 32
MIN_PASSPHRASE_CHARS = 8
MAX_WRAPPED_BYTES = 1 << 16
TIME_LIMIT_S = 60  # of a wrap or unwrap command; also enough to enter a PIN

_PARAMS = re.compile(r"m=(\d{1,8}),t=(\d{1,3}),p=(\d{1,3})")
# Version of the root's wrap. Not the format of the keyring, whose conversion keeps the wrap.
_ROOT_VERSION = 1


# Smallest and largest memory (KiB), iterations and lanes of stored Argon2id parameters. They are
# checked before memory or time is spent.
_Limits = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
KEYRING_LIMITS: _Limits = ((8 * 1024, 4 * 1024 * 1024), (1, 64), (1, 64))
# An export may come from anyone, and its parameters are used before it is authenticated.
EXPORT_LIMITS: _Limits = ((8 * 1024, 512 * 1024), (1, 8), (1, 8))


NewKey = tuple[str, bytes, bytes]  # parameters and data to store, and the master key


@dataclass(frozen=True)
class Argon2Cost:
    """Cost of one guess at a passphrase."""

    memory_kib: int = 256 * 1024  # 256 MiB
    iterations: int = 3  # passes over the memory
    lanes: int = 4

    def __str__(self) -> str:
        return f"m={self.memory_kib},t={self.iterations},p={self.lanes}"

    @classmethod
    def parse(cls, text: str, limits: _Limits = KEYRING_LIMITS) -> Argon2Cost:
        """Parse a stored form; raise KeyringCorrupt if it is malformed or out of bounds."""
        match = _PARAMS.fullmatch(text)
        if match is None:
            raise KeyringCorrupt(f"passphrase parameters {text!a} are not m=..,t=..,p=..")
        values = [int(number) for number in match.groups()]
        for name, value, (low, high) in zip("mtp", values, limits, strict=True):
            if not low <= value <= high:
                raise KeyringCorrupt(
                    f"passphrase parameter {name}={value}; allowed {low} to {high}"
                )
        return cls(*values)


@dataclass(frozen=True)
class KeyFile:
    """A master key in a file of 32 random bytes that only its owner may read."""

    path: Path
    kdf: ClassVar[str] = KDF_FILE

    def create_if_missing(self) -> None:
        """Write a new random key unless the file exists. Concurrent processes get the same key."""
        if not os.path.lexists(self.path):
            with suppress(FileExistsError):
                write_new_private(self.path, random_key())

    def new_key(self) -> NewKey:
        """Return parameters and data to store for a new keyring (none), and the master key."""
        return "", b"", self.unlock()

    def unlock(self, _params: str = "", _data: bytes = b"") -> bytes:
        """Return the master key; fail unless the file is private and has 32 bytes."""
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

    # At least 8 characters, in Unicode form NFC: systems differ in how they encode a typed accent.
    text: str
    # of a guess, for a new keyring; an existing keyring stores its own
    cost: Argon2Cost = field(default_factory=Argon2Cost)
    kdf: ClassVar[str] = KDF_ARGON2ID

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", unicodedata.normalize("NFC", self.text))

    def __repr__(self) -> str:
        """Keep the passphrase out of logs."""
        return "Passphrase(...)"

    def new_key(self) -> NewKey:
        """Return parameters and salt to store for a new keyring, and the master key."""
        self.check_strength()
        params, salt = str(self.cost), os.urandom(KDF_SALT_BYTES)
        return params, salt, self.unlock(params, salt)

    def check_strength(self) -> None:
        """Raise UsageError if the passphrase is too short for a new keyring or export."""
        if len(self.text) < MIN_PASSPHRASE_CHARS:
            raise UsageError(
                f"the passphrase has {len(self.text)} characters; at least {MIN_PASSPHRASE_CHARS} "
                "are required"
            )

    def unlock(self, params: str, data: bytes) -> bytes:
        """Return the master key for stored parameters and salt."""
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

    def new_key(self) -> NewKey:
        """Return parameters and data to store for a new keyring (none), and the master key."""
        return "", b"", self.unlock()

    def unlock(self, _params: str = "", _data: bytes = b"") -> bytes:
        """Return the master key; it is never written to a file. Raises errors of `read_key`."""
        return read_key(self.paths)


@dataclass(frozen=True)
class WrapCommand:
    """A random master key that an external command wraps; the keyring stores the wrapped key.

    The commands read standard input, write standard output, and are not run in a shell. So a key
    service or a smart card protects the keyring, and sees neither the root nor any other key.
    """

    unwrap_line: str  # command line that returns the master key for the wrapped key
    wrap_line: str | None = None  # command line that wraps a master key; only for a new master
    kdf: ClassVar[str] = KDF_COMMAND

    def new_key(self) -> NewKey:
        """Return no parameters, the wrapped key to store, and a new random master key."""
        if self.wrap_line is None:
            raise UsageError("a new master needs --wrap-command in addition to --unwrap-command")
        key = random_key()
        wrapped, shown = _run("wrap", self.wrap_line, key)
        if not 0 < len(wrapped) <= MAX_WRAPPED_BYTES:
            raise KeyringError(
                f"the wrap command returned {len(wrapped)} bytes; expected 1 to "
                f"{MAX_WRAPPED_BYTES}{shown}"
            )
        if key in wrapped:
            raise KeyringError("the wrap command returned the master key unencrypted")
        if self.unlock("", wrapped) != key:
            raise KeyringError("the unwrap command does not return the key that was wrapped")
        return "", wrapped, key

    def unlock(self, _params: str, data: bytes) -> bytes:
        """Return the master key for the wrapped key of the keyring."""
        key, shown = _run("unwrap", self.unwrap_line, data)
        if len(key) != KEY_BYTES:
            raise KeyringError(
                f"the unwrap command returned {len(key)} bytes; expected {KEY_BYTES}{shown}"
            )
        return key


def _run(name: str, line: str, content: bytes) -> tuple[bytes, str]:
    """Return the standard output of a command, and its standard error as the end of a message.

    Raises:
        UsageError: The command cannot be run.
        KeyringError: It fails, or takes too long.
    """
    option = f"--{name}-command {line!r}"
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{option} is not a command line: {error}") from None
    if not words:
        raise UsageError(f"{option} is empty")
    try:
        done = subprocess.run(  # noqa: S603 - the user's own command
            words, input=content, capture_output=True, timeout=TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise KeyringError(f"{option} did not end within {TIME_LIMIT_S} s") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{option} cannot be run: {reason}") from None
    text = " / ".join(done.stderr.decode(errors="replace").split("\n")).strip(" /")
    shown = f"; it wrote: {text[-500:]}" if text else ""
    if done.returncode:
        code = done.returncode
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise KeyringError(f"{option} ended with {end}{shown}")
    return done.stdout, shown


Master = KeyFile | KeyShares | Passphrase | WrapCommand

_NEEDED = {
    KDF_FILE: "a master key file (--master) or its shares (--share)",
    KDF_ARGON2ID: "a passphrase",
    KDF_COMMAND: "a command (--unwrap-command)",
}


def unlock_root(head: HeadRow, master: Master, path: Path) -> bytes:
    """Return the root key of the keyring at a path; raise WrongMaster if it has another master."""
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


def new_root(keyring_id: bytes, kdf: str, new_key: NewKey, epoch: int) -> tuple[bytes, HeadRow]:
    """Return a new root key and the head row that wraps it under a master's `new_key`."""
    params, data, master_key = new_key
    head = HeadRow(FORMAT, keyring_id, kdf, params, data, b"", epoch, b"")
    root = random_key()
    wrap = seal(master_key, "root", _root_aad(head), root)
    return root, replace(head, root_wrap=wrap)


def unwrap(key: bytes, context: str, aad: bytes, wrapped: bytes) -> bytes:
    """Open a wrap that the keyring stores; raise KeyringCorrupt if it was edited."""
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
        """Raise UsageError if the file exists and is not from a killed rekey of this keyring."""
        self._path, self._mark = path, mark_of(path)
        self._keyring_id, self._epoch = head.keyring_id, head.epoch
        self._written: dict[Path, bytes] = {}  # content, recorded before each file is written
        self._is_leftover()

    def make(self) -> None:
        """Write the mark and the key file, unless a killed rekey did."""
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
        """Return whether the file exists; if so, it must be from a killed rekey of this keyring."""
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
