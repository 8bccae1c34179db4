"""A package that is not installed is one line, exit code 2.

Without this a Python without the requirements, above all one whose virtual environment was not
activated, answers with a traceback. A module of the project itself, or a part of an installed
package, that is missing is a mistake in the code and keeps its traceback.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, TracebackType

from utils.errors import UserError

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
