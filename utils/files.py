"""Files and folders that are written completely or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError

_RUN = secrets.token_hex(3)  # mark of this process, since process numbers are reused
_NEARLY_FULL = 1 << 20
_REASONS = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "raise the limit on file sizes or choose another folder",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.EISDIR: "choose another name",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the device",
}


class WriteError(UserError, OSError):
    """A file or folder could not be written; an earlier file of that name is unchanged."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success rename it to ``path``.

    The renaming is atomic and durable: at any time, also after a kill or a power cut, ``path`` is
    the complete old file or the complete new one. On any error the temporary file is removed and
    the old file stays.

    Args:
        path: The file; its folder is created if necessary.

    Yields:
        Path to write to, which does not exist yet. It has the same suffix, by which some writers
        choose a format.

    Raises:
        WriteError: The folder cannot be written to, or the device is full.
    """
    path = Path(path)
    ensure_folder(path.parent)
    temporary = temporary_beside(path)
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        _keep_mode(path, temporary)
        temporary.replace(path)
    except OSError as error:
        if isinstance(error, UserError) or error.errno not in _REASONS:
            raise
        raise WriteError(_sentence(path, error)) from error
    except RuntimeError as error:
        # On a full disk torch's zip writer raises a RuntimeError with a message of its own format.
        torn = any(word in str(error) for word in ("inline_container", "iostream", "writ"))
        if torn and free_bytes(path.parent) < _NEARLY_FULL:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise WriteError(_sentence(path, full)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder_if_possible(path.parent)


def sync_folder_if_possible(folder: Path) -> None:
    """Make the names in a folder survive a power cut, if its file system supports that."""
    with contextlib.suppress(OSError):
        _sync(folder, os.O_RDONLY)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file by :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise unless a path is a regular file; reading from a pipe or a device may never end.

    Raises:
        OSError: It does not exist, or is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - also for plain strings
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def ensure_folder(path: str | Path) -> Path:
    """Create a folder and its parents if necessary, and check that files can be written in it.

    Raises:
        WriteError: It is a file, or it cannot be created or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(_sentence(path, error)) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise WriteError(_sentence(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    return path


def temporary_beside(path: Path, *, suffix: bool = True) -> Path:
    """Return a temporary name in the folder of a file; `remove_leftovers` finds it after a kill.

    Args:
        path: The file that is to be written.
        suffix: Whether the name ends in the file's suffix.
    """
    stem, end = (path.stem, path.suffix) if suffix else (path.name, "")
    return path.with_name(f".{stem}.{os.getpid()}-{_RUN}{secrets.token_hex(4)}.tmp{end}")


def remove_leftovers(folder: str | Path, of: str = "") -> int:
    """Remove temporary files that killed processes left in a folder; return how many.

    Files of running processes are kept. In containers every run has the same process number, so a
    file with this process's number but without its random mark is from an earlier run.

    Args:
        folder: The folder.
        of: Name of the file whose temporary files are removed; '' for all files.
    """
    removed = 0
    for path in Path(folder).glob(".*.*-*.tmp*"):
        start, _, middle = path.name.rsplit(".tmp", 1)[0].rpartition(".")
        process, _, rest = middle.partition("-")
        if (of and start != f".{of}") or not process.isdigit():
            continue
        own = int(process) == os.getpid()
        if not rest.startswith(_RUN) if own else not is_running(int(process)):
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def is_running(process: int) -> bool:
    """Return whether a process with this number runs on this machine, of any user."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def free_bytes(folder: str | Path) -> int:
    """Return the free bytes of the file system that contains ``folder``."""
    return shutil.disk_usage(folder).free


def _sentence(path: Path, error: OSError) -> str:
    remedy = _REASONS.get(error.errno or 0, "choose another folder")
    return f"cannot write {path}: {error.strerror or error}; {remedy} (nothing was overwritten)"


def _sync(path: Path, flags: int) -> None:
    """Wait until the contents of a file or folder are on the device."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _keep_mode(path: Path, temporary: Path) -> None:
    """Give the new file the old one's permissions."""
    with contextlib.suppress(OSError):
        temporary.chmod(path.stat().st_mode)


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill; on success rename it to ``target``.

    Files of an interrupted run are removed at the next start. A folder that is replaced is renamed
    first, and restored if the new one cannot take its name.

    Args:
        target: The final name.
        overwrite: Whether to replace an existing folder.

    Raises:
        UserError: The folder cannot be renamed, for example because ``target`` exists now.
        OSError: Nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    tag = f"{socket.gethostname()}-{os.getpid()}"
    staging = target.with_name(f".{target.name}.partial-{tag}")
    aside = target.with_name(f".{target.name}.replaced-{tag}")
    staging.mkdir()
    try:
        yield staging
        if overwrite and target.exists():
            target.rename(aside)
        try:
            staging.rename(target)
        except OSError as error:
            if aside.exists():
                aside.rename(target)
            raise UserError(f"{target} cannot be created ({error.strerror}); try again") from error
        sync_folder_if_possible(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if target.exists():  # never delete the only copy
            shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path) -> None:
    """Remove the folders that killed runs left next to ``target``, or restore the replaced one."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-(.+)-(\d+)")
    for folder in sorted(target.parent.glob(f".{target.name}.*")):
        match = pattern.fullmatch(folder.name)
        if match is None or match[2] != socket.gethostname() or _is_used(int(match[3])):
            continue
        if match[1] == "replaced" and not target.exists():
            folder.rename(target)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_used(pid: int) -> bool:
    """Return whether another running process uses a staging folder."""
    return pid != os.getpid() and is_running(pid)
