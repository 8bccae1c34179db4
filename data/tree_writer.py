"""Write the folders of a validation split: linked images and a record."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from data.datasets.layout import Counts, LoadedData, parse_market_name
from data.datasets.market1501 import SPLIT_RECORD, VALIDATION_FOLDERS, tree_hash
from data.problems import DatasetError
from data.records import Sample
from utils.errors import UserError
from utils.logger import Progress

Parts = Mapping[str, Sequence[Sample]]


def market_names(
    samples: Sequence[Sample], known: Mapping[str, str], first_camera: int = 1
) -> dict[str, str]:
    """Return a Market-style name for every image, by its path.

    A name that contains identity and camera is kept. Others (such as MSMT17's) become
    ``PPPP_cC_IIII.jpg`` with a camera without leading zeros and IIII the index among the person's
    images.

    Args:
        samples: Samples whose pids are numbered together: a training set, or a test set.
        known: Names by path that the loader gives.
        first_camera: Number of camera 0 in names.
    """
    names: dict[str, str] = {}
    numbers: Counter[int] = Counter()
    for sample in sorted(samples, key=lambda s: s.path):
        name = known.get(sample.path) or Path(sample.path).name
        if not _contains(name, sample, first_camera):
            suffix = Path(sample.path).suffix.lower()
            camera, number = sample.camid + first_camera, numbers[sample.pid]
            name = f"{sample.pid:04d}_c{camera}_{number:04d}{suffix}"
            numbers[sample.pid] += 1
        names[sample.path] = name
    return names


def arrange(parts: Parts, names: Mapping[str, str]) -> dict[str, dict[str, Path]]:
    """Assign the images to the five folders; return the paths by new name for each folder.

    Raises:
        DatasetError: Two images of a folder would have the same name.
    """
    folders: dict[str, dict[str, Path]] = {name: {} for name in VALIDATION_FOLDERS.values()}
    for subset, samples in parts.items():
        folder = folders[VALIDATION_FOLDERS[subset]]
        for sample in samples:
            name = names[sample.path]
            if name in folder:
                raise DatasetError(
                    "same-name-twice",
                    f"{folder[name]} and {sample.path} would both be named {name}; rename one",
                )
            folder[name] = Path(sample.path)
    return folders


def _contains(name: str, sample: Sample, first_camera: int) -> bool:
    who = parse_market_name(name)
    return who is not None and (who.pid, who.camera - first_camera) == (sample.pid, sample.camid)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Check that the target folder does not exist, or is a split that may be overwritten.

    Raises:
        UserError: It exists, and ``overwrite`` is False or it is not a split.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(
            f"{target} exists; use it, replace it with --overwrite, or write to another folder "
            "with --output_dir"
        )
    parts = (SPLIT_RECORD, VALIDATION_FOLDERS["val_query"])
    is_split = any((target / name).exists() for name in parts)
    if target.is_symlink() or not is_split:
        raise UserError(
            f"{target} is not a validation split, so --overwrite does not delete it; move it away"
        )


def fill(staging: Path, folders: Mapping[str, Mapping[str, Path]]) -> str:
    """Create every image under its new name; return the method used for most images.

    Hard links take no space and stay valid when the original is renamed. If they are not possible,
    for example on another file system, symbolic links are used, and copies as the last resort.
    Images that were extracted into ``staging`` are moved.
    """
    ways: dict[str, int] = {}
    with Progress(sum(map(len, folders.values())), "linking") as bar:
        for folder, names in folders.items():
            (staging / folder).mkdir()
            for name, source in names.items():
                way = _link(source, staging / folder / name, staging)
                ways[way] = ways.get(way, 0) + 1
                bar.update(1)
    return max(ways, key=lambda way: ways[way])


def _link(source: Path, target: Path, staging: Path) -> str:
    if source.is_relative_to(staging):
        source.rename(target)
        return "extracted"
    source = source.resolve()
    attempts: dict[str, Callable[[], object]] = {
        "hard link": lambda: os.link(source, target),
        "symbolic link": lambda: target.symlink_to(source),
    }
    for way, attempt in attempts.items():
        with contextlib.suppress(OSError):
            attempt()
            return way
    shutil.copy2(source, target)
    return "copy"


def write_record(
    staging: Path,
    loaded: LoadedData,
    parts: Parts,
    folders: Mapping[str, Mapping[str, Path]],
    facts: Mapping[str, object],
) -> None:
    """Write ``split.json``: source, strategy, counts and the hash of the names."""
    record = {
        "schema": 1,
        **facts,
        "layout": loaded.layout,
        "notes": dict(loaded.splits.notes),
        "counts": {
            VALIDATION_FOLDERS[subset]: asdict(Counts.of(tuple(parts[subset])))
            for subset in VALIDATION_FOLDERS
        },
        "hash": tree_hash(
            f"{folder}/{name}" for folder, names in folders.items() for name in names
        ),
    }
    path = staging / SPLIT_RECORD
    with path.open("w", encoding="utf-8") as stream:
        json.dump(record, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
