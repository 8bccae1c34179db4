"""Files of tensors: written whole, and read without running code or unbounded memory."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from utils.errors import UserError, first_line
from utils.files import atomic_write

# Containers can contain one another many times, so a small file could unfold without limit.
_MAX_VALUES = 5_000_000
_MAX_DEPTH = 50
_MAX_REPEATED_BYTES = 2**30  # of tensors that repeat stored values, as expanded ones do


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

    The file may come from anywhere. It is not executed, and the memory that it takes is bounded by
    its size and 1 GiB for tensors that repeat stored values.

    Raises:
        TensorFileError: The file is missing or damaged, or contains anything else.
    """
    if not path.is_file():
        raise TensorFileError(f"{path} does not exist; expected a file of tensors")
    try:
        is_zip = zipfile.is_zipfile(path)  # the format since torch 1.6
        if is_zip:
            _check_records(path)
        with path.open("rb") as file:
            # torch cannot open a name that is not UTF-8, and maps files by name only.
            name = f"/proc/self/fd/{file.fileno()}"
            # Mapped, a tensor that claims more bytes than its record cannot reach beyond the file.
            content = torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)
        if not isinstance(content, dict):
            raise TensorFileError(
                f"{path} contains a {type(content).__name__}; expected tensors by name"
            )
        return _checked_copy(content, path)
    except TensorFileError:
        raise
    except pickle.UnpicklingError as error:
        raise TensorFileError(
            f"{path} is not a file of tensors and plain values, and was not executed; it is "
            "damaged or from another program"
        ) from error
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError,
        ValueError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise TensorFileError(
            f"{path} is damaged ({first_line(error)}); restore it from a copy, or use another file"
        ) from error


def _check_records(path: Path) -> None:
    """Raise if the records of a zip file are larger than the file, as compressed ones can be."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    total = sum(record.file_size for record in records)
    if total > path.stat().st_size or any(r.compress_type != zipfile.ZIP_STORED for r in records):
        raise TensorFileError(
            f"{path} contains compressed data of {total} bytes; expected a file of torch.save, "
            "which does not compress"
        )


def _checked_copy(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content with tensors that own their memory."""
    copies: dict[int, Tensor] = {}
    num_values = num_repeated = 0

    def copied(value: Any, depth: int) -> Any:
        nonlocal num_values, num_repeated
        num_values += 1
        if num_values > _MAX_VALUES or depth > _MAX_DEPTH:
            raise TensorFileError(
                f"{path} contains more than {_MAX_VALUES} values or {_MAX_DEPTH} nested ones; "
                "expected a checkpoint"
            )
        if isinstance(value, Tensor):
            if id(value) not in copies:
                num_repeated += _repeated_bytes(value, path)
                if num_repeated > _MAX_REPEATED_BYTES:
                    raise TensorFileError(
                        f"{path} contains tensors such as {tuple(value.shape)} that repeat fewer "
                        "stored values; expected a checkpoint"
                    )
                copies[id(value)] = value.detach().clone()
            return copies[id(value)]
        if isinstance(value, dict):
            return {copied(k, depth + 1): copied(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple | set):
            return type(value)(copied(item, depth + 1) for item in value)
        return value

    return cast("dict[str, Any]", copied(content, 0))


def _repeated_bytes(tensor: Tensor, path: Path) -> int:
    """Return by how many bytes a tensor is larger than what the file stores of it."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise TensorFileError(f"{path} contains a sparse, quantized or meta tensor")
    return max(0, tensor.numel() * tensor.element_size() - tensor.untyped_storage().nbytes())
