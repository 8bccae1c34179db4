"""Files that contain secrets: readable by their owner only, never a link, never overwritten."""

from __future__ import annotations

import ctypes
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling.encryption.ised_errors import InsecurePermissions, KeyringMissing, StorageError
from utils.files import PRIVATE_MODE, WriteError, atomic_write, remove_leftovers

_PR_SET_DUMPABLE = 4  # linux/prctl.h


def check_private(path: Path, what: str) -> os.stat_result:
    """Return the status of a secret file that only its owner can read; ``what`` is its purpose.

    Raises:
        KeyringMissing: It does not exist.
        InsecurePermissions: It is a link or not a file, belongs to another user, or is readable by
            others.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise KeyringMissing(f"{what} {path} does not exist; check the path, or run init") from None
    except OSError as error:
        raise KeyringMissing(f"{what} {path} cannot be reached: {error.strerror}") from None
    if stat.S_ISLNK(status.st_mode):
        raise InsecurePermissions(f"{what} {path} is a symbolic link; give the path of the file")
    if not stat.S_ISREG(status.st_mode):
        raise InsecurePermissions(f"{what} {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise InsecurePermissions(
            f"{what} {path} belongs to user {status.st_uid}, not to you ({os.geteuid()}); "
            f"run: chown {os.geteuid()} {path} && chmod 600 {path}"
        )
    if status.st_mode & 0o077:
        raise InsecurePermissions(
            f"{what} {path} can be read by others (mode {stat.S_IMODE(status.st_mode):03o}); "
            f"run: chmod 600 {path}"
        )
    return status


def read_private(path: Path, what: str, limit: int = 1 << 20) -> bytes:
    """Return the content of a secret file after checking it, at most ``limit`` bytes.

    Raises:
        KeyringMissing, InsecurePermissions: See `check_private`; or another file replaced it after
            the check.
    """
    checked = check_private(path, what)
    # Non-blocking: a pipe may have replaced the file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not os.path.samestat(checked, os.fstat(descriptor)):
            raise InsecurePermissions(
                f"{what} {path} was replaced while it was read; check who can write to "
                f"{path.parent}"
            )
        return file.read(limit)


@contextmanager
def new_private_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file (0600) that becomes ``path`` only if the block succeeds.

    The final name is linked, never replaced: of several processes exactly one succeeds.

    Raises:
        FileExistsError: The final name is taken.
        StorageError: The folder cannot be written to, or the disk is full.
    """
    if not path.parent.is_dir():
        raise StorageError(f"cannot write {path}: {path.parent} is not a folder; create it first")
    remove_leftovers(path.parent)  # a killed process may have left a copy of a secret
    try:
        with atomic_write(path, mode=PRIVATE_MODE, overwrite=False, keep_name=True) as temporary:
            yield temporary
    except WriteError as error:
        raise StorageError(str(error)) from None


def write_new_private(path: Path, content: bytes) -> None:
    """Write a secret file that does not exist yet.

    Raises:
        FileExistsError: It exists; it stays unchanged.
        StorageError: It cannot be written.
    """
    with new_private_file(path) as temporary:
        temporary.write_bytes(content)


def forbid_memory_dumps() -> None:
    """Keep keys in the memory of this process out of core dumps and other processes of the user.

    On Linux the process also becomes not dumpable: no debugger of the same user can attach.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
