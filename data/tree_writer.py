"""Writing the tree of a validation split: linked pictures, a record, then the final name."""

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
from data.datasets.market1501 import VALIDATION_FOLDERS, tree_hash
from data.problems import DatasetError
from data.records import Sample
from utils.errors import UserError
from utils.progress import Progress

RECORD = "split.json"
Parts = Mapping[str, Sequence[Sample]]


def market_names(samples: Sequence[Sample], known: Mapping[str, str]) -> dict[str, str]:
    """Choose a Market-style name for every picture, by its path.

    A name that already says identity and camera is kept. Others (MSMT17's) become
    ``PPPP_cC_IIII.jpg`` with the camera not padded and IIII counting the person's pictures.

    Args:
        samples: Pictures of persons that are numbered together: a training set, or a test set.
        known: Names by path that are to be taken, where the loader knows better.
    """
    names: dict[str, str] = {}
    numbers: Counter[int] = Counter()
    for sample in sorted(samples, key=lambda s: s.path):
        name = known.get(sample.path) or Path(sample.path).name
        if not _says(name, sample):
            suffix = Path(sample.path).suffix.lower()
            name = f"{sample.pid:04d}_c{sample.camid + 1}_{numbers[sample.pid]:04d}{suffix}"
            numbers[sample.pid] += 1
        names[sample.path] = name
    return names


def arrange(parts: Parts, names: Mapping[str, str]) -> dict[str, dict[str, Path]]:
    """Sort the pictures into the five folders; returns for each the paths by new name.

    Raises:
        DatasetError: Two pictures of a folder would have the same name.
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


def _says(name: str, sample: Sample) -> bool:
    who = parse_market_name(name)
    return who is not None and (who.pid, who.camera - 1) == (sample.pid, sample.camid)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse to touch what stands under the final name, unless asked to, and if it is a split.

    Raises:
        UserError: With the reason.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(
            f"{target} exists; use it as it is, give --overwrite to make it anew, or --output_dir "
            "to write elsewhere"
        )
    ours = (target / RECORD).is_file() or (target / VALIDATION_FOLDERS["val_query"]).is_dir()
    if target.is_symlink() or not ours:
        raise UserError(
            f"{target} is not a validation split, so --overwrite will not delete it; move it away"
        )


def fill(staging: Path, folders: Mapping[str, Mapping[str, Path]]) -> str:
    """Put every picture under its new name; returns how most of them got there.

    A hard link costs nothing and outlives the original's name; where the file system has none, or
    the data lies on another one, a symbolic link; failing that a copy. Pictures that were made
    inside ``staging`` are moved.
    """
    ways: dict[str, int] = {}
    with Progress(sum(map(len, folders.values())), "linking") as bar:
        for folder, names in folders.items():
            (staging / folder).mkdir()
            for name, source in names.items():
                way = _place(source, staging / folder / name, staging)
                ways[way] = ways.get(way, 0) + 1
                bar.update(1)
    return max(ways, key=lambda way: ways[way])


def _place(source: Path, target: Path, staging: Path) -> str:
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
    """Write ``split.json``: what was divided, how, into how many, and its hash."""
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
    path = staging / RECORD
    with path.open("w", encoding="utf-8") as stream:
        json.dump(record, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
