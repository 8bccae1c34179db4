"""Files that hold secrets: made for their owner alone, never through a link, never overwritten."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling.encryption.ised_errors import InsecurePermissions, KeyringMissing, StorageError
from utils.files import remove_leftovers, temporary_beside

PRIVATE_MODE = 0o600
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


def check_private(path: Path, what: str) -> os.stat_result:
    """Refuse a secret file that somebody else may read or have put there.

    Args:
        path: The file.
        what: What it is, for the message.

    Returns:
        What the system knows of the file that was checked.

    Raises:
        KeyringMissing: It does not exist.
        InsecurePermissions: It is a link or no file, another user's, or readable by others.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise KeyringMissing(f"{what} {path} does not exist; check the path, or run init") from None
    except OSError as error:
        raise KeyringMissing(f"{what} {path} cannot be reached: {error.strerror}") from None
    if stat.S_ISLNK(status.st_mode):
        raise InsecurePermissions(f"{what} {path} is a symbolic link; name the file itself")
    if not stat.S_ISREG(status.st_mode):
        raise InsecurePermissions(f"{what} {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise InsecurePermissions(
            f"{what} {path} belongs to user {status.st_uid}, not to you ({os.geteuid()}); "
            f"run: chown {os.geteuid()} {path} && chmod 600 {path}"
        )
    if status.st_mode & 0o077:
        raise InsecurePermissions(
            f"{what} {path} may be read by others (mode {stat.S_IMODE(status.st_mode):03o}); "
            f"run: chmod 600 {path}"
        )
    return status


def read_private(path: Path, what: str, limit: int = 1 << 20) -> bytes:
    """Return the content of a secret file after checking it.

    Raises:
        KeyringMissing, InsecurePermissions: As for `check_private`, or another file took its place
            after it was checked.
    """
    checked = check_private(path, what)
    # Not to wait: in place of the file a pipe may lie there by now.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not os.path.samestat(checked, os.fstat(descriptor)):
            raise InsecurePermissions(
                f"{what} {path} was replaced while it was read; see who may write in {path.parent}"
            )
        return file.read(limit)


@contextmanager
def new_private_file(path: Path) -> Iterator[Path]:
    """Give an empty temporary file (0600) that takes its final name only if the block succeeds.

    The final name is linked, never replaced: of several processes exactly one wins.

    Raises:
        FileExistsError: The final name is taken.
        StorageError: The folder cannot be written to.
    """
    remove_leftovers(path.parent)  # a killed process may have left a copy of a secret
    temporary = temporary_beside(path, suffix=False)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    try:
        os.close(os.open(temporary, flags, PRIVATE_MODE))
    except OSError as error:
        raise StorageError(f"cannot write in {path.parent}: {error.strerror}") from None
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        link_without_clobber(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_new_private(path: Path, content: bytes) -> None:
    """Write a secret file that does not exist yet.

    Raises:
        FileExistsError: It exists; it is left as it is.
        StorageError: It cannot be written.
    """
    with new_private_file(path) as temporary:
        try:
            temporary.write_bytes(content)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from None


def link_without_clobber(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its final name; the temporary name stays.

    Raises:
        FileExistsError: The final name is taken.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links: reserve the name, then replace it
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_MODE))
        temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
