"""CUHK03's new protocol: which picture is whose, and in which subset, from its MATLAB 5 file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.datasets.matlab import check_format, require
from data.problems import DatasetError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Protocol:
    """One kind's list of n pictures and its division.

    Attributes:
        names: ``K_PPP_V_II.png`` (pair, identity, camera, cell) of every picture.
        labels: Identity of every picture, int64 (n,), 1..1467.
        cameras: Camera of every picture, int64 (n,), from 1.
        subsets: Places, counted from 0, of ``train``, ``query`` and ``gallery``.
    """

    names: tuple[str, ...]
    labels: Indices
    cameras: Indices
    subsets: dict[str, Indices]


def config_name(kind: str) -> str:
    """File name the protocol of a kind goes by."""
    return f"cuhk03_new_protocol_config_{kind}.mat"


def read_protocol(path: Path) -> Protocol:
    """Read a ``cuhk03_new_protocol_config_*.mat``.

    Raises:
        DatasetError: scipy is missing, or the file is not such a protocol.
    """
    check_format(path, "matlab5")
    scipy_io = require("scipy.io", "reading CUHK03's new protocol")
    try:
        content = scipy_io.loadmat(str(path))
        names = tuple(str(np.asarray(cell).item()) for cell in content["filelist"].ravel())
        labels, cameras = _integers(content["labels"]), _integers(content["camId"])
        # int64 before the arithmetic: in the file they are uint16, where 0 - 1 is 65535.
        subsets = {
            subset: _integers(content[f"{subset}_idx"]) - 1
            for subset in ("train", "query", "gallery")
        }
    except Exception as error:  # scipy lets through whatever the broken stream made it stumble over
        raise _broken(path, f"{type(error).__name__}: {error}") from error
    if not len(names) == len(labels) == len(cameras):
        raise _broken(path, f"{len(names)} names, {len(labels)} labels, {len(cameras)} cameras")
    for subset, places in subsets.items():
        if len(places) == 0 or places.min() < 0 or places.max() >= len(names):
            raise _broken(path, f"{subset}_idx does not lie within 1..{len(names)}")
    return Protocol(names, labels, cameras, subsets)


def _integers(values: Any) -> Indices:  # noqa: ANN401 - whatever scipy made of the MATLAB array
    return np.asarray(values).astype(np.int64).ravel()


def _broken(path: Path, why: str) -> DatasetError:
    return DatasetError(
        "bad-protocol",
        f"{path} is not CUHK03's new protocol ({why}); copy the original file again",
    )
