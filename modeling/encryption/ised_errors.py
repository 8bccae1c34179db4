"""Named errors of the encryption; the class says the exit code and whether a batch stops.

Exit codes: 1 some files failed, 2 usage, 3 environment (disk, device), 4 keyring, 5 at least one
authentication failure. No message ever holds key material.
"""

from __future__ import annotations

from utils.errors import UserError

# ruff: noqa: N818 - the names are part of the interface: users meet them in messages and scripts


class IsedError(UserError):
    """Base of everything the encryption refuses.

    Attributes:
        exit_code: Exit code of a tool that met this error.
        stops: Whether a batch ends here; otherwise it goes on with the next file.
    """

    exit_code = 1
    stops = False


class FormatError(IsedError):
    """Bytes that are not exactly one ISED v1 file.

    Attributes:
        offset: Place of the first byte that is not as the format has it; -1 where none is to name.
    """

    def __init__(self, message: str, offset: int = -1) -> None:
        """Keep the offset and put it into the text."""
        super().__init__(message if offset < 0 else f"{message} (at byte {offset})")
        self.offset = offset


class NotProtected(FormatError):
    """A file without an isEd chunk: never sealed, or re-saved by a program that dropped it."""


class UnsupportedVersion(FormatError):
    """A file of another format version."""


class TooLarge(FormatError):
    """More pixels than the format allows; said before any memory is taken."""


class AuthenticationError(IsedError):
    """Base of WrongKey and Tampered."""

    exit_code = 5


class WrongKey(AuthenticationError):
    """The key is not the one the data was sealed under, or the commitment is damaged."""


class Tampered(AuthenticationError):
    """The key is right and the data was changed after sealing."""


class MissingKey(IsedError):
    """No key of this keyring belongs to the file."""


class RevokedKey(IsedError):
    """The key exists and its use was revoked."""


class DestroyedKey(IsedError):
    """The key was destroyed; what was sealed under it is gone for good."""


class BadInput(IsedError):
    """A source picture that cannot be read as an 8-bit picture without alpha."""


class UnsafePath(IsedError):
    """A path in metadata that would leave the output folder."""


class PathTooLong(IsedError):
    """A relative path of more bytes than the metadata holds."""


class OutputExists(IsedError):
    """The output name is taken by a file made from another source."""


class UsageError(IsedError):
    """Arguments that contradict each other; nothing was touched."""

    exit_code = 2
    stops = True


class StorageError(IsedError):
    """The disk is full, read-only or failing, or memory or a process is gone."""

    exit_code = 3
    stops = True


class KeyringError(IsedError):
    """Base of everything that is wrong with the keyring or its master; a batch stops."""

    exit_code = 4
    stops = True


class KeyringMissing(KeyringError):
    """There is no keyring, or no master key file, at the path."""


class KeyringExists(KeyringError):
    """A keyring is there already; it is never overwritten."""


class KeyringLocked(KeyringError):
    """Another process held the keyring longer than the time allowed."""


class KeyringCorrupt(KeyringError):
    """The keyring is not one, is damaged, or was edited by hand."""


class WrongMaster(KeyringError):
    """The master key or passphrase is not this keyring's."""


class InsecurePermissions(KeyringError):
    """A secret file that others may read, that belongs to someone else, or that is a link."""
