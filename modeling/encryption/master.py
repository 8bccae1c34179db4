"""The master secret of a keyring: a 32-byte key file, or a passphrase through Argon2id."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from modeling.encryption.errors import KeyringCorrupt, StorageError, UsageError, WrongMaster
from modeling.encryption.primitives import KEY_BYTES, random_key
from modeling.encryption.secret_files import read_private, write_new_private
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
