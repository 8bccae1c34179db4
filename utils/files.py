"""Files and folders that are written completely or not at all, also after a kill or a power cut.

At the end: names of files in the two forms of Unicode.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

PRIVATE_MODE = 0o600
LOCK_NAME = ".lock"
MAX_LOCK_BYTES = 512  # process and host, for messages
# Also the names of earlier versions, which contain a process number.
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(\d+-[0-9a-f]+|[0-9a-f]{16})\.tmp(?P<end>-journal|\.[^.]+)?"
)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NEARLY_FULL = 1 << 20
_REASONS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another folder"),
    errno.EFBIG: "raise the limit on file sizes or choose another folder",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you may write to"),
    **dict.fromkeys((errno.EISDIR, errno.EEXIST, errno.ENOTDIR), "choose another name"),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the device",
}


class WriteError(UserError, OSError):
    """A file or folder could not be written; an earlier file of that name is unchanged."""

    cause: OSError  # error of the operating system


class FolderInUseError(UserError):
    """Another process writes to the same folder."""


@contextlib.contextmanager
def atomic_write(
    path: str | Path,
    *,
    mode: int | None = None,
    overwrite: bool = True,
    keep_name: bool = False,
    sync_names: bool = True,
) -> Iterator[Path]:
    """Yield a temporary file in the folder of ``path``; on success it becomes ``path``.

    This is atomic and durable: at any time, also after a kill or a power cut, ``path`` is the
    complete old file or the complete new one. On any error the temporary file is removed and the
    old file stays. The folder is created if necessary.

    The temporary file is empty and locked. It has the same suffix, by which some writers choose a
    format, unless ``keep_name`` is set.

    Args:
        path: The file.
        mode: Permissions; by default those of the old file, or the usual ones for a new file.
        overwrite: Replace an old file. Otherwise exactly one of several processes succeeds.
        keep_name: Use the whole name, instead of the stem, for the name of the temporary file.
        sync_names: Sync the folder too. False if the caller does that, once for many files.

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False.
        FileNotFoundError: The block wrote nothing.
        WriteError: The folder cannot be written to, or the device is full.
    """
    path = Path(path)
    ensure_folder(path.parent)
    with contextlib.ExitStack() as stack:
        try:
            usual = 0o666 if mode is None else mode
            temporary = stack.enter_context(_temporary_file(path, usual, keep_name=keep_name))
            yield temporary
            _check_written(temporary)
            _sync(temporary, os.O_RDWR)
            if overwrite:
                if mode is None:
                    with contextlib.suppress(OSError):  # keep the old file's permissions
                        temporary.chmod(path.stat().st_mode)
                temporary.replace(path)
            else:
                _link(temporary, path)
            if sync_names:
                sync_folder(path.parent)
        except OSError as error:
            taken = isinstance(error, FileExistsError) and not overwrite
            if taken or isinstance(error, UserError) or error.errno not in _REASONS:
                raise
            raise _write_error(path, error) from error
        except RuntimeError as error:
            # On a full disk torch's zip writer raises a RuntimeError with its own message.
            torn = any(word in str(error) for word in ("inline_container", "iostream", "writ"))
            if torn and shutil.disk_usage(path.parent).free < _NEARLY_FULL:
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise _write_error(path, full) from error
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, if its file system supports that.

    Raises:
        OSError: The device failed.
    """
    try:
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file by :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise unless a path is a regular file; reading from a pipe or a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - also for plain strings
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_at_most(path: str | os.PathLike[str], limit: int) -> bytes | None:
    """Return the content of a regular file; None, unread, if it has more bytes than a limit.

    A large sparse file costs an attacker nothing, but would fill the memory.
    """
    check_regular(path)
    with Path(path).open("rb") as file:
        is_long = os.fstat(file.fileno()).st_size > limit
        content = b"" if is_long else file.read(limit + 1)  # it may have grown
    return None if is_long or len(content) > limit else content


def ensure_folder(path: str | Path) -> Path:
    """Create a folder and its parents if necessary, and check that files can be written in it.

    Raises:
        WriteError: It is a file, or it cannot be created or written to.
    """
    path = Path(path)
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in new:
            sync_folder(folder.parent)
    except OSError as error:
        raise _write_error(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise _write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return path


@contextlib.contextmanager
def locked_folder(path: str | Path) -> Iterator[Path]:
    """Create a folder, let no other process enter this context for it, and yield the folder.

    The lock is the operating system's, on the file ``.lock``. It ends with the process in any case,
    so a file that a killed process left does not lock anything. On a file system without locks two
    processes can enter. A folder that is created here and stays empty is removed at the end.

    Raises:
        FolderInUseError: Another process, or another thread of this one, holds the lock.
        WriteError: The folder cannot be created or written to, or ``.lock`` is a link.
    """
    is_new = not Path(path).exists()
    folder = ensure_folder(path)
    descriptor = _lock_folder(folder / LOCK_NAME)
    try:
        yield folder
    finally:
        _FOLDER_LOCKS.discard(descriptor)
        with contextlib.suppress(OSError):
            times = folder.stat()
            (folder / LOCK_NAME).unlink()  # before the lock ends, so it is this process's file
            os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))  # `protect` sets them to 0
            if is_new:
                folder.rmdir()  # unless something was written
        os.close(descriptor)


_FOLDER_LOCKS: set[int] = set()  # open descriptors of lock files


def _close_folder_locks() -> None:
    """Close the lock files in a forked process, which could outlive this one and keep them."""
    for descriptor in _FOLDER_LOCKS:
        os.close(descriptor)
    _FOLDER_LOCKS.clear()


os.register_at_fork(after_in_child=_close_folder_locks)


def _lock_folder(path: Path) -> int:
    """Create and lock a lock file; return its descriptor."""
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _not_a_lock_file(path) from None
            raise _write_error(path, error) from error
        # Through a symbolic or hard link, the lines below would destroy another file.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            raise _not_a_lock_file(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                holder = os.read(descriptor, MAX_LOCK_BYTES).decode("utf-8", "replace").strip()
                os.close(descriptor)
                raise FolderInUseError(
                    f"{path.parent} is in use by {holder or 'another process'}; wait until it has "
                    "ended, or choose another folder"
                ) from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # the previous holder has just removed the file
    with contextlib.suppress(OSError):  # for messages only
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
    _FOLDER_LOCKS.add(descriptor)
    return descriptor


def _not_a_lock_file(path: Path) -> WriteError:
    error = WriteError(f"{path} is a link or not a regular file; remove it, then try again")
    error.cause = OSError(errno.EINVAL, "not a lock file")
    return error


def remove_leftovers(folder: str | Path, of: str = "") -> int:
    """Remove the temporary files that killed processes left in a folder; return how many.

    Only those of the file named ``of`` are removed; '' is for all files. A running process holds a
    lock on its temporary files, so an unlocked one is a leftover. Process numbers would not do:
    they are reused, and other containers have their own.
    """
    removed = 0
    for path in sorted(Path(folder).glob(".*.tmp*")):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or (of and match["name"] != of):
            continue
        if match["end"] == "-journal":  # SQLite's, of a temporary file
            leftover = not os.path.lexists(str(path).removesuffix("-journal"))
            lock: int | None = None
        else:
            lock = _try_lock(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            leftover = lock is not None and stat.S_ISREG(os.fstat(lock).st_mode)
        if leftover:
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
        if lock is not None:
            os.close(lock)
    if removed:  # a copy of a secret must not come back after a power cut
        with contextlib.suppress(OSError):
            sync_folder(Path(folder))
    return removed


@contextlib.contextmanager
def _temporary_file(path: Path, mode: int, *, keep_name: bool) -> Iterator[Path]:
    """Yield a new empty file in the folder of ``path``, locked until it is removed at the end."""
    stem, suffix = (path.name, "") if keep_name else (path.stem, path.suffix)
    while True:
        temporary = path.with_name(f".{stem}.{secrets.token_hex(8)}.tmp{suffix}")
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, mode)
        try:
            with contextlib.suppress(OSError):
                os.utime(descriptor, (0, 0))  # see _check_written
            if not _lock(descriptor, temporary):
                continue  # another process removed it before it was locked
            yield temporary
            return
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            os.close(descriptor)


def _check_written(temporary: Path) -> None:
    """Raise FileNotFoundError if a temporary file is as `_temporary_file` created it."""
    status = temporary.stat()
    if status.st_size == 0 and status.st_mtime_ns == 0:
        raise FileNotFoundError(errno.ENOENT, "nothing was written to the file", str(temporary))


def _lock(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder until it is closed; return False if it was removed before.

    On file systems without locks it stays unlocked, and `_try_lock` fails for it.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _try_lock(path: Path, flags: int) -> int | None:
    """Open and lock a file or folder; return its descriptor, or None if a process uses it."""
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _link(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its final name, which must be free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: reserve the name, then replace it.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_MODE))
        temporary.replace(path)


def _write_error(path: Path, error: OSError) -> WriteError:
    remedy = _REASONS.get(error.errno or 0, "choose another folder")
    reason = error.strerror or error
    write_error = WriteError(f"cannot write {path}: {reason}; {remedy} (nothing was overwritten)")
    write_error.cause = error
    return write_error


def _sync(path: Path, flags: int) -> None:
    """Wait until the contents of a file or folder are on the device."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill; on success rename it to ``target``.

    Files of an interrupted run are removed at the next start. A folder that is replaced is renamed
    first, and restored if the new one cannot take its name.

    Raises:
        UserError: The folder cannot be renamed, for example because ``target`` exists now.
        OSError: Nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    tag = secrets.token_hex(8)
    staging = target.with_name(f".{target.name}.partial-{tag}")
    aside = target.with_name(f".{target.name}.replaced-{tag}")
    with contextlib.ExitStack() as stack:
        while not staging.exists():  # before it is held, another process may remove it
            staging.mkdir()
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_held(staging))
        try:
            yield staging
            os.sync()  # faster than a sync of every file
            if overwrite and target.exists():
                stack.enter_context(_held(target))
                target.rename(aside)
            try:
                staging.rename(target)
            except OSError as error:
                if aside.exists():
                    aside.rename(target)
                raise UserError(
                    f"{target} cannot be created ({error.strerror}); try again"
                ) from error
            sync_folder(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if target.exists():  # never delete the only copy
                shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path) -> None:
    """Remove the folders that killed runs left next to ``target``, or restore the replaced one."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-.+")
    for folder in sorted(target.parent.glob(f".{target.name}.*")):
        match = pattern.fullmatch(folder.name)
        if match is None:
            continue
        lock = _try_lock(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if lock is None:  # a running process fills it
            continue
        try:
            if match[1] == "replaced" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, under any name, so that `recover` leaves it alone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


# --- Names that can be encoded in several ways. Unicode has two forms of an accented letter: one
# character (NFC), or a letter and an accent (NFD). Keyboards, editors and file systems differ in
# which form they produce. A comparison of labels or paths from different sources therefore compares
# their NFC forms.


def composed(text: str) -> str:
    r"""Return text in NFC.

    Example:
        >>> composed("Zoe\u0308") == "Zo\u00eb"
        True
    """
    return unicodedata.normalize("NFC", text)


def unicode_forms(text: str) -> list[str]:
    r"""Return text as given, in NFC and in NFD, without repetitions.

    Example:
        >>> len(unicode_forms("Zo\u00eb")), len(unicode_forms("Zoe"))
        (2, 1)
    """
    return list(dict.fromkeys((text, composed(text), unicodedata.normalize("NFD", text))))


def expanded(path: str | Path) -> Path:
    """Return a path whose leading ``~`` or ``~user`` is replaced by the home folder.

    A path such as ``~photos`` is returned unchanged if there is no user of that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def existing_path(path: Path) -> Path:
    """Return a path in the Unicode forms in which it exists; unchanged if it does not exist.

    Each folder and the file may have another form.
    """
    if path.exists():
        return path
    current = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        forms = (current / form for form in unicode_forms(part))
        current = next((form for form in forms if form.exists()), current / part)
    return current if current.exists() else path
