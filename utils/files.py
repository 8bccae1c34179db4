"""Files a user keeps: written whole or not at all.

Folders that appear whole or not at all.
"""

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


class WriteError(UserError, OSError):
    """A file or folder could not be written; what stood there before is unharmed."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it takes that name, durably, in one step.

    Whoever opens ``path`` at any moment, also after a kill or a power cut, finds the whole old file
    or the whole new one. On an error of any kind the temporary is removed and the old file stays.

    Args:
        path: Where the file is to be; its folder is made if need be.

    Yields:
        Path to write to: in the same folder, not there yet, with the same last suffix, as some
        writers choose a format by it.

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
        # torch's zip writer meets a full disk with a RuntimeError of its own wording.
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
    """Make the names in a folder survive a power cut, where its file system can."""
    with contextlib.suppress(OSError):
        _sync(folder, os.O_RDONLY)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file by :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is no file: a pipe would keep the reader waiting, a device would never end.

    Raises:
        OSError: It is not there, or is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - also for plain strings
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def ensure_folder(path: str | Path) -> Path:
    """Make a folder and its parents, and check that files can be written in it.

    Raises:
        WriteError: It is a file, or it cannot be made or written to.
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
    """Return a new name in the folder of a file, which `remove_leftovers` finds after a kill.

    Args:
        path: The file that is to be.
        suffix: End in the file's own suffix; otherwise it stays before the rest.
    """
    stem, end = (path.stem, path.suffix) if suffix else (path.name, "")
    return path.with_name(f".{stem}.{os.getpid()}-{_RUN}{secrets.token_hex(4)}.tmp{end}")


def remove_leftovers(folder: str | Path, of: str = "") -> int:
    """Remove temporaries that killed processes left in a folder; return how many.

    Those of processes that still run are left alone. A container gives every run the same process
    number: what bears this process's number and not its mark was left by an earlier one.

    Args:
        folder: Where to look.
        of: Only those of the file of this name; of all files if empty.
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
    """Tell whether there is a process of a number on this machine, whoever owns it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def free_bytes(folder: str | Path) -> int:
    """Return how many bytes a user may still write where ``folder`` lies."""
    return shutil.disk_usage(folder).free


_RUN = secrets.token_hex(3)  # tells this process's temporaries from those of one of its number
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


def _sentence(path: Path, error: OSError) -> str:
    remedy = _REASONS.get(error.errno or 0, "choose another folder")
    return f"cannot write {path}: {error.strerror or error}; {remedy} (nothing was overwritten)"


def _sync(path: Path, flags: int) -> None:
    """Wait until a file's or folder's contents are on the device."""
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
    """Give a folder to fill; it takes the name ``target`` only when all has gone well.

    What an interrupted run left is cleared at the next start. A replaced tree is put aside first,
    and put back if its successor cannot take the name.

    Args:
        target: The final name.
        overwrite: Whether to replace a folder of that name.

    Raises:
        UserError: The folder cannot take its name, for instance because it exists by now.
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
            raise UserError(f"{target} cannot be made ({error.strerror}); try again") from error
        sync_folder_if_possible(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if target.exists():  # never delete the only copy
            shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path) -> None:
    """Clear what runs that were killed have left beside ``target``, or put it back."""
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
    """Tell whether another process is at it; this one starts anew."""
    return pid != os.getpid() and is_running(pid)
