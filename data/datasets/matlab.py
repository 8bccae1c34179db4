"""Opening MATLAB files: what really lies under a ``.mat`` name, and the optional readers."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Literal

from data.problems import DatasetError

Format = Literal["hdf5", "matlab5"]

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# MATLAB v7.3 puts 512 bytes of its own before the HDF5 file; HDF5 itself allows any power of two.
_USER_BLOCKS = (0, 512, 1024, 2048)


def require(module: str, why: str) -> ModuleType:
    """Import an optional reader.

    Raises:
        DatasetError: It is not installed; the text says which command installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DatasetError(
            f"missing-{package}",
            f"{why} needs {package}, not installed here; run `python3 -m pip install {package}`, "
            "or bring the pictures extracted (CUHK03-NP folders)",
        ) from error


def check_format(path: Path, expected: Format) -> None:
    """See that a file is the kind of MATLAB file it should be, before any reader touches it.

    Raises:
        DatasetError: It is a web page, a Git-LFS pointer, empty, truncated or of the other format.
    """
    with path.open("rb") as stream:
        head = stream.read(max(_USER_BLOCKS) + len(_HDF5_SIGNATURE))
    found = _describe(head)
    if found == expected:
        return
    names = {"hdf5": "a MATLAB v7.3 file (HDF5)", "matlab5": "a MATLAB 5 file"}
    code, remedy = {
        "a Git-LFS pointer": ("lfs-pointer-as-mat", "fetch the file itself with `git lfs pull`"),
        "an HTML page": (
            "html-as-mat",
            "the server sent a web page instead: download it in a browser and accept the terms",
        ),
    }.get(found, ("bad-mat", "download it again, or copy the original file"))
    raise DatasetError(
        code, f"{path} is {names.get(found, found)}, expected {names[expected]}; {remedy}"
    )


def _describe(head: bytes) -> str:
    if any(head[start : start + len(_HDF5_SIGNATURE)] == _HDF5_SIGNATURE for start in _USER_BLOCKS):
        return "hdf5"
    if head.startswith(b"MATLAB 5.0"):
        return "matlab5"
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML page"
    return "not a MATLAB file"
