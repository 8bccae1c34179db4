"""Errors of the encryption. Each class has an exit code and states whether a batch stops.

Exit codes: 1 some files failed, 2 usage, 3 environment (disk, device), 4 keyring, 5 at least one
authentication failure. No message contains key material.
"""

from __future__ import annotations

from utils.errors import UserError

# ruff: noqa: N818 - the names are part of the interface: users meet them in messages and scripts


class IsedError(UserError):
    """Base class of all errors of the encryption."""

    exit_code = 1  # of a command that ends with this error
    stops = False  # whether a batch stops here; otherwise it continues with the next file

    def of_one_file(self) -> IsedError:
        """Return the error if it concerns one file of a batch; raise it if the batch stops."""
        if self.stops:
            raise self
        return self


class FormatError(IsedError):
    """Bytes that are not exactly one file of ISED version 1."""

    def __init__(self, message: str, offset: int = -1) -> None:
        """Append the position of the first unexpected byte to the message, unless it is -1."""
        super().__init__(message if offset < 0 else f"{message} (at byte {offset})")
        self.offset = offset


class NotProtected(FormatError):
    """A file without an isEd chunk: never sealed, or re-saved by a program that dropped it."""


class UnsupportedVersion(FormatError):
    """A file of another format version."""


class TooLarge(FormatError):
    """More pixels or bytes than the format allows; raised before memory is allocated."""


class AuthenticationError(IsedError):
    """Base class of WrongKey and Tampered."""

    exit_code = 5


class WrongKey(AuthenticationError):
    """The data was sealed under another key, or its commitment is damaged."""


class Tampered(AuthenticationError):
    """The key is right, but the data was changed after it was sealed."""


class MissingKey(IsedError):
    """The keyring has no key for the file."""


class RevokedKey(IsedError):
    """The key exists, but its use was revoked."""


class DestroyedKey(IsedError):
    """The key was destroyed; what was sealed under it can never be opened again."""


class BadInput(IsedError):
    """A source image that cannot be read as an 8-bit image without alpha."""


class UnsafePath(IsedError):
    """A path in metadata that would leave the output folder."""


class PathTooLong(IsedError):
    """A relative path with more bytes than the metadata can store."""


class OutputExists(IsedError):
    """The output name is taken by a file made from another source."""


class OutputBlocked(IsedError):
    """The name of an output cannot be written; outputs with other names can."""


class UsageError(IsedError):
    """Arguments that contradict each other; nothing was changed."""

    exit_code = 2
    stops = True


class StorageError(IsedError):
    """The disk is full, read-only or failing, memory ran out, or a process died."""

    exit_code = 3
    stops = True


class KeyringError(IsedError):
    """Base class of errors of the keyring or its master; a batch stops."""

    exit_code = 4
    stops = True


class KeyringMissing(KeyringError):
    """The keyring or the master key file does not exist."""


class KeyringExists(KeyringError):
    """A file already exists at the path; it is never overwritten."""


class KeyringLocked(KeyringError):
    """Another process held the keyring longer than the timeout."""


class KeyringCorrupt(KeyringError):
    """The file is not a keyring, is damaged, or was edited by hand."""


class WrongMaster(KeyringError):
    """The master key or passphrase does not belong to this keyring."""


class InsecurePermissions(KeyringError):
    """A secret file that others can read, that has another owner, or that is a link."""
