"""Taking the pictures out of CUHK03's original ``cuhk-03.mat`` (MATLAB v7.3, which is HDF5)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.datasets.matlab import check_format, require
from data.problems import DatasetError
from data.staging import staged_folder
from utils.errors import UserError
from utils.progress import Progress

Pixels = NDArray[np.uint8]

_CELLS_PER_CAMERA = 5


def iterate_images(path: Path, kind: str) -> Iterator[tuple[str, Pixels]]:
    """Yield ``K_PPP_V_II.png`` and the pixels (H, W, 3) of every picture of a kind.

    Raises:
        DatasetError: h5py is missing, or the file is not CUHK03's.
    """
    for name, data in _walk(path, kind):
        yield name, np.ascontiguousarray(data[:].T)


def list_names(path: Path, kind: str) -> list[str]:
    """Names of all pictures of a kind, without reading a pixel; raises like ``iterate_images``."""
    return [name for name, _ in _walk(path, kind)]


def _walk(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield name and HDF5 data set of every picture."""
    check_format(path, "hdf5")
    h5py = require("h5py", "reading CUHK03's original cuhk-03.mat")
    try:
        with h5py.File(path, "r") as mat:
            yield from _pictures(mat, kind)
    except (KeyError, OSError, IndexError, TypeError, ValueError) as error:
        raise DatasetError(
            "bad-mat", f"{path} cannot be read as CUHK03 ({error}); download it again"
        ) from error


def _pictures(mat: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """Walk the list of camera pairs and the M x 10 cells of each, five cells per camera.

    MATLAB stores columns first, so every level is transposed, the picture too. An empty cell points
    at one shared array without a third dimension.
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


def extract(path: Path, kind: str, target: Path) -> Path:
    """Write every picture of a kind as PNG, once; ``target`` appears only when it is whole.

    Args:
        path: The ``cuhk-03.mat``.
        kind: ``labeled`` or ``detected``.
        target: Folder to make.

    Returns:
        ``target``.

    Raises:
        DatasetError: The file cannot be read.
        OSError: The folder cannot be written.
    """
    if target.is_dir():
        return target
    try:
        with (
            staged_folder(target) as staging,
            Progress(len(list_names(path, kind)), f"Extracting {kind} boxes") as progress,
        ):
            for name, pixels in iterate_images(path, kind):
                # Level 1: the same pixels as level 6 in a third of the time, a tenth more bytes.
                Image.fromarray(pixels).save(staging / name, compress_level=1)
                progress.update()
    except UserError as error:
        # Another run was quicker: its pictures are the same.
        if isinstance(error, DatasetError) or not target.is_dir():
            raise
    return target


def cache_folder(path: Path, kind: str, home: Path) -> Path:
    """Choose where the pictures go: beside the data like everybody has them, else the user's cache.

    Args:
        path: The ``cuhk-03.mat``.
        kind: ``labeled`` or ``detected``.
        home: The data set's folder.
    """
    beside = home / f"images_{kind}"
    if beside.is_dir() or os.access(home, os.W_OK):
        return beside
    stat = path.stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "securereid" / f"cuhk03-{stat.st_size}-{stat.st_mtime_ns}" / f"images_{kind}"
