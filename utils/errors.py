"""Errors that a user can cause and fix, errors of full memory, and packages that are missing."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType

from utils.world import World

_ROOT = Path(__file__).resolve().parents[1]
# Messages of libraries that allocate GPU memory themselves, and of compilers that report the error.
_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED", "_HOST_ALLOCATION_FAILED", "_DEVICE_ALLOCATION_FAILED",  # cuDNN
    "CUDA error: out of memory", "CUDA out of memory", "DefaultCPUAllocator: can't allocate",
)  # fmt: skip


class UserError(ValueError):
    """Base of all errors that a user can cause and fix.

    The text states what is wrong, the value that was given, what is allowed and what to do. Scripts
    print it as one line, without a traceback, and exit with ``exit_code``.
    """

    exit_code = 2


_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: str) -> str:
    r"""Return text that every terminal and log file can show.

    Bytes of file names that are not UTF-8 are escaped, and colour codes in messages of libraries
    are removed.

    Example:
        >>> printable("run\udcff: \x1b[1mfailed\x1b[0m")
        'run\\udcff: failed'
    """
    return _COLOUR_CODES.sub("", text).encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: BaseException) -> str:
    """Return the beginning of a foreign error's text, for a message of one sentence."""
    return printable((str(error).splitlines() or [type(error).__name__])[0][:160])


@contextlib.contextmanager
def naming_keys(*keys: str) -> Iterator[None]:
    """Add configuration keys to the text of a UserError.

    Library code takes values and does not know their keys. The function that reads the keys calls
    it inside this context.
    """
    try:
        yield
    except UserError as error:
        error.args = (f"{error} ({', '.join(keys)})",)
        raise


def out_of_memory(error: Exception) -> bool:
    """Return whether an error reports that memory is full, a GPU's or the machine's.

    Torch's own error is recognised by its name, since commands that do not need torch do not load
    it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def shortage(error: Exception) -> str:
    """Return the first sentence of an out-of-memory error, without the place in torch's source."""
    text = str(error)
    start = max(text.find("DefaultCPUAllocator"), 0)
    return text[start:].split(". ")[0].partition("\n")[0] or type(error).__name__


class WorkerError(UserError):
    """Worker processes died, hang or cannot be started."""

    exit_code = 1


def worker_died(error: BaseException) -> bool:
    """Return whether an error reports that a worker process of a pool or DataLoader was killed."""
    if type(error).__name__ == "BrokenProcessPool":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and text.startswith("DataLoader worker")


def worker_death(remedy: str) -> str:
    """Return the message for a killed worker; ``remedy`` names the option for fewer workers."""
    return f"a worker process died, perhaps because memory ran out; {remedy}"


def brief_excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report Ctrl-C during imports, or a package that is not installed, in one line.

    A package is missing most often because the virtual environment was not activated. A missing
    module of this project, or a missing part of an installed package, is a mistake in the code and
    keeps its traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        processes = sys.modules.get("multiprocessing.process")
        is_worker = processes is not None and processes.parent_process() is not None
        if World.from_environment().is_main and not is_worker:
            sys.stderr.write("interrupted\n")
        return  # Python then ends the process as the signal does
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if not name or "." in name or (_ROOT / name).is_dir() or (_ROOT / f"{name}.py").exists():
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(
        f"error: package {name} is not installed for {sys.executable}; activate the virtual "
        "environment (`make setup` creates one in .venv), or run `pip install -r "
        "requirements.txt`\n"
    )
    raise SystemExit(2)


def optional_package(name: str, why: str, remedy: str) -> ModuleType:
    """Import a package that only some commands need.

    Raises:
        UserError: It is not installed, or is broken.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{why} needs the package {name}, which {sys.executable} cannot import ({error}); run "
            f"`{remedy}`"
        ) from error
