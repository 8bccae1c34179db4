"""Files of tensors: written whole, and read without running any code that they contain."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import atomic_write


class TensorFileError(UserError):
    """A file of tensors is missing, damaged, or not a file of tensors."""


def save_tensors(content: Mapping[str, Any], path: Path) -> None:
    """Write with ``torch.save``; ``path`` is the whole old file or the whole new one at any time.

    Raises:
        WriteError: The file cannot be written.
    """
    with atomic_write(path) as temporary:
        torch.save(dict(content), temporary)


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the content of a file of tensors and plain values, on the CPU.

    Raises:
        TensorFileError: The file is missing or damaged, or contains anything else.
    """
    if not path.is_file():
        raise TensorFileError(f"{path} does not exist; expected a file of tensors")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TensorFileError(
            f"{path} is not a file of tensors and plain values, and was not executed; it is "
            "damaged or from another program"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TensorFileError(
            f"{path} is damaged ({_first_line(error)}); restore it from a copy, or use another file"
        ) from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise TensorFileError(f"{path} contains a {kind}; expected tensors by name")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
