"""CUHK03's MATLAB files: the new protocol (MATLAB 5) and the original images (v7.3, which is HDF5).

The reader of ``cuhk-03.mat``, h5py, is an optional package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.images import describe_content
from data.problems import DatasetError
from utils.errors import UserError
from utils.files import staged_folder
from utils.logger import Progress

Format = Literal["hdf5", "matlab5"]
Indices = NDArray[np.int64]
Pixels = NDArray[np.uint8]

_CELLS_PER_CAMERA = 5
_FORMAT_NAMES = {"hdf5": "a MATLAB v7.3 file (HDF5)", "matlab5": "a MATLAB 5 file"}

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# MATLAB v7.3 writes 512 bytes before the HDF5 file. HDF5 allows any power of two.
_USER_BLOCKS = (0, 512, 1024, 2048)


def _check_format(path: Path, expected: Format) -> None:
    """Raise if a file is an HTML page, a Git-LFS pointer, empty, or of the other format."""
    with path.open("rb") as stream:
        head = stream.read(max(_USER_BLOCKS) + len(_HDF5_SIGNATURE))
    actual = _format_of(head)
    if actual == expected:
        return
    content = _FORMAT_NAMES[actual] if actual else describe_content(head) or "not a MATLAB file"
    code, fix = "bad-mat", "download it again, or copy the original file"
    if "Git-LFS" in content:
        code, fix = "lfs-pointer-as-mat", "fetch the file with `git lfs pull`"
    elif "HTML" in content:
        code = "html-as-mat"
        fix = "the server sent a web page instead: download it in a browser and accept the terms"
    raise DatasetError(code, f"{path} is {content}; expected {_FORMAT_NAMES[expected]}; {fix}")


def _format_of(head: bytes) -> Format | None:
    if any(head[start : start + len(_HDF5_SIGNATURE)] == _HDF5_SIGNATURE for start in _USER_BLOCKS):
        return "hdf5"
    return "matlab5" if head.startswith(b"MATLAB 5.0") else None


@dataclass(frozen=True)
class Protocol:
    """The list of n images of one kind, and their subsets."""

    names: tuple[str, ...]  # ``K_PPP_V_II.png`` (pair, identity, camera, cell) of every image
    labels: Indices  # identity of every image, int64 (n,), 1..1467
    cameras: Indices  # camera of every image, int64 (n,), from 1
    subsets: dict[str, Indices]  # indices, from 0, of ``train``, ``query`` and ``gallery``


def config_name(kind: str) -> str:
    """Return the file name of the protocol of a kind."""
    return f"cuhk03_new_protocol_config_{kind}.mat"


def read_protocol(path: Path) -> Protocol:
    """Read a ``cuhk03_new_protocol_config_*.mat``.

    Raises:
        DatasetError: The file is not such a protocol.
    """
    from scipy.io import loadmat  # noqa: PLC0415 - no other data set needs it

    _check_format(path, "matlab5")
    try:
        content = loadmat(str(path))
        names = tuple(str(np.asarray(cell).item()) for cell in content["filelist"].ravel())
        labels, cameras = _integers(content["labels"]), _integers(content["camId"])
        # Converted to int64 first: the file has uint16, in which 0 - 1 is 65535.
        subsets = {
            subset: _integers(content[f"{subset}_idx"]) - 1
            for subset in ("train", "query", "gallery")
        }
    except Exception as error:  # scipy raises many types on damaged files
        raise _broken(path, f"{type(error).__name__}: {error}") from error
    if not len(names) == len(labels) == len(cameras):
        raise _broken(path, f"{len(names)} names, {len(labels)} labels, {len(cameras)} cameras")
    for subset, indices in subsets.items():
        if len(indices) == 0 or indices.min() < 0 or indices.max() >= len(names):
            raise _broken(path, f"{subset}_idx is not within 1..{len(names)}")
    return Protocol(names, labels, cameras, subsets)


def _integers(values: Any) -> Indices:  # noqa: ANN401 - the type depends on the file
    return np.asarray(values).astype(np.int64).ravel()


def _broken(path: Path, why: str) -> DatasetError:
    return DatasetError(
        "bad-protocol", f"{path} is not CUHK03's new protocol ({why}); copy the original file again"
    )


def iterate_images(path: Path, kind: str) -> Iterator[tuple[str, Pixels]]:
    """Yield ``K_PPP_V_II.png`` and the pixels (H, W, 3) of every image of a kind.

    Raises:
        DatasetError: h5py is not installed, or the file is not CUHK03's.
    """
    for name, data in _walk(path, kind):
        yield name, np.ascontiguousarray(data[:].T)


def list_names(path: Path, kind: str) -> list[str]:
    """Return the names of :func:`iterate_images` without reading pixels; raises the same errors."""
    return [name for name, _ in _walk(path, kind)]


def _walk(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield name and HDF5 dataset of every image."""
    _check_format(path, "hdf5")
    try:
        h5py = import_module("h5py")  # an optional package
    except ImportError as error:
        raise DatasetError(
            "missing-h5py",
            "reading CUHK03's original cuhk-03.mat needs h5py, which is not installed; run "
            "`python3 -m pip install h5py`, or use extracted images (CUHK03-NP folders)",
        ) from error
    try:
        with h5py.File(path, "r") as mat:
            yield from _images(mat, kind)
    except (KeyError, OSError, IndexError, TypeError, ValueError) as error:
        raise DatasetError(
            "bad-mat", f"{path} cannot be read as CUHK03 ({error}); download it again"
        ) from error


def _images(mat: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield the M x 10 cells of each camera pair, five cells per camera.

    MATLAB stores columns first, so every level is transposed, and the image too. An empty cell
    refers to one shared array without a third dimension.
    """
    for pair_index, pair_ref in enumerate(mat[kind][0]):
        cells = mat[pair_ref][:].T
        for identity, row in enumerate(cells):
            for cell, ref in enumerate(row):
                data = mat[ref]
                if data.ndim < 3:
                    continue
                camera = 1 + cell // _CELLS_PER_CAMERA
                name = f"{pair_index + 1}_{identity + 1:03d}_{camera}_{cell + 1:02d}.png"
                yield name, data


def extract(path: Path, kind: str, target: Path) -> None:
    """Write every image of a kind as PNG, once; ``target`` exists only when it is complete.

    Raises:
        DatasetError: The file cannot be read.
        OSError: The folder cannot be written.
    """
    if target.is_dir():
        return
    try:
        with (
            staged_folder(target) as staging,
            Progress(len(list_names(path, kind)), f"Extracting {kind} boxes") as progress,
        ):
            for name, pixels in iterate_images(path, kind):
                # Level 1 takes a third of the time of level 6 and a tenth more bytes.
                Image.fromarray(pixels).save(staging / name, compress_level=1)
                progress.update()
    except UserError as error:
        # Another run was faster; its images are the same.
        if isinstance(error, DatasetError) or not target.is_dir():
            raise


def cache_folder(path: Path, kind: str, home: Path) -> Path:
    """Return the folder for extracted images: next to the data, or in the user's cache."""
    usual = home / f"images_{kind}"
    if usual.is_dir() or os.access(home, os.W_OK):
        return usual
    stat = path.stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "securereid" / f"cuhk03-{stat.st_size}-{stat.st_mtime_ns}" / f"images_{kind}"
