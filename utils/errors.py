"""The one base of every error that a user can cause and mend, and how full memory is told.

A package that is not installed is one line, exit code 2.

Without this a Python without the requirements, above all one whose virtual environment was not
activated, answers with a traceback. A module of the project itself, or a part of an installed
package, that is missing is a mistake in the code and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType

# Of libraries that ask the driver for memory by themselves, and of a compiler that met the error.
_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED", "_HOST_ALLOCATION_FAILED", "_DEVICE_ALLOCATION_FAILED",  # cuDNN
    "CUDA error: out of memory", "CUDA out of memory", "DefaultCPUAllocator: can't allocate",
)  # fmt: skip


class UserError(ValueError):
    """Something asked for cannot be done; the text says what, got, allowed and the remedy.

    Command-line tools print it as one line and exit with ``exit_code``; a traceback would only
    hide the sentence.
    """

    exit_code = 2


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
    """Tell whether an error says that memory is full, a GPU's or the machine's.

    Torch's own is told by its name: commands that do not need torch do not load it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def shortage(error: Exception) -> str:
    """Return the first sentence of an error of ``out_of_memory``, without where torch raised it."""
    text = str(error)
    start = max(text.find("DefaultCPUAllocator"), 0)
    return text[start:].split(". ")[0].partition("\n")[0] or type(error).__name__


def worker_died(error: BaseException) -> bool:
    """Return whether an error reports that a worker process of a pool or DataLoader was killed."""
    if type(error).__name__ == "BrokenProcessPool":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and text.startswith("DataLoader worker")


def worker_death(remedy: str) -> str:
    """Return the message for a killed worker; ``remedy`` names the option for fewer workers."""
    return f"a worker process died, perhaps because memory ran out; {remedy}"


_ROOT = Path(__file__).resolve().parents[1]


def name_missing_package(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Be Python's ``sys.excepthook``; what is raised here ends the program in its turn."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if not name or "." in name or (_ROOT / name).is_dir() or (_ROOT / f"{name}.py").exists():
        sys.__excepthook__(kind, error, trace)
        return
    sys.stderr.write(
        f"error: package {name} is not installed for {sys.executable}; activate the virtual "
        "environment (`make setup` makes one in .venv), or `pip install -r requirements.txt`\n"
    )
    raise SystemExit(2)


def optional_package(name: str, why: str, remedy: str) -> ModuleType:
    """Import a package that only some commands need.

    Args:
        name: Its name.
        why: What needs it.
        remedy: Command that installs it.

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
