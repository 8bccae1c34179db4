"""One's own pictures in folders: ``folder:PATH``.

Three arrangements are understood:

* ``PATH/{bounding_box_train,query,bounding_box_test}``, or ``PATH/{train,query,gallery}``, with
  Market-style names (optionally with the two validation folders of ``data/train_split.py``);
* the same folders with one sub-folder per person: ``PATH/train/<pid>/*``;
* ``PATH/<pid>/*`` alone: persons are divided into training, validation and test, 3 : 1 : 1.

The camera comes from the base name (``_c3_``, ``_c3s1_``, ``c3.jpg``); without it, it is camera 0.
"""

from __future__ import annotations

import re
from pathlib import Path

from data import problems as wrong
from data.datasets.layout import (
    SUBSETS,
    LoadedData,
    LoadRequest,
    list_folders,
    list_images,
    pid_of_text,
    subject_of,
    whole_number,
)
from data.datasets.market1501 import JUNK_PID, VALIDATION_FOLDERS, read_folder, split_of
from data.positives import stranger_problems
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample
from data.splits import divide_persons

_CAMERA = re.compile(r"(?:^|[_-])c(?:am)?(\d+)(?:s\d+)?(?=[_.-])", re.IGNORECASE)
_NEEDED = ("train", "query", "gallery")


def load(request: LoadRequest) -> LoadedData:
    """Load ``folder:PATH``; a relative path counts from the working directory, then from the root.

    Raises:
        DatasetError: There is nothing there that can be read.
    """
    home = resolve(request)
    if not home.is_dir():
        raise not_there(request, f"{home} is not a folder")
    dataset = home.resolve().name
    problems: list[Problem] = []
    folders = {subset: _subset_folder(home, subset) for subset in SUBSETS}
    present = [subset for subset in SUBSETS if folders[subset] is not None]
    if present:
        layout, parts = _load_subsets(home, dataset, folders, problems)
    else:
        layout = "one folder per person"
        parts = _load_persons(home, dataset, problems)
    splits = DatasetSplits(
        request.name,
        train=parts.get("train", ()),
        query=parts.get("query", ()),
        gallery=parts.get("gallery", ()),
        val_query=parts.get("val_query", ()),
        val_gallery=parts.get("val_gallery", ()),
        notes={"layout": layout},
    )
    problems += stranger_problems(splits)
    return LoadedData(splits, dataset, layout, home, {}, tuple(problems))


def resolve(request: LoadRequest) -> Path:
    """Path after the colon."""
    given = Path(request.name.partition(":")[2]).expanduser()
    beside = request.root / given
    return beside if not given.exists() and beside.exists() else given


def not_there(request: LoadRequest, what: str) -> DatasetError:
    """Refuse a path after the colon that leads nowhere."""
    return DatasetError(
        "not-found",
        f"DATASETS.NAMES {request.name}: {what}; give a path from the working directory or from "
        "DATASETS.ROOT_DIR",
    )


def _subset_folder(home: Path, subset: str) -> Path | None:
    names = (VALIDATION_FOLDERS[subset], subset)
    return next((home / name for name in names if (home / name).is_dir()), None)


def _load_subsets(
    home: Path, dataset: str, folders: dict[str, Path | None], problems: list[Problem]
) -> tuple[str, dict[str, tuple[Sample, ...]]]:
    lacking = [subset for subset in _NEEDED if folders[subset] is None]
    if lacking:
        raise DatasetError(
            "missing-folder",
            f"{home} lacks {', '.join(lacking)}; expected train (bounding_box_train), query and "
            "gallery (bounding_box_test)",
        )
    parts: dict[str, tuple[Sample, ...]] = {}
    for subset, folder in folders.items():
        if folder is None:
            continue
        persons = _persons_in(folder)
        if persons:
            parts[subset] = _as_samples(_read_persons(persons), dataset, split_of(subset))
        else:  # cameras as they are written: one's own may count from 0
            content = read_folder(folder, dataset, subset, first_camera=0)
            parts[subset] = content.samples
            problems += content.problems
    return "Market-style folders", parts


_Found = list[tuple[Path, int, int]]


def _persons_in(folder: Path) -> list[Path]:
    """List the sub-folders that hold pictures."""
    return [person for person in list_folders(folder) if list_images(person)]


def _read_persons(persons: list[Path]) -> _Found:
    by_pid: dict[int, Path] = {}
    found = []
    for person in persons:
        pid = pid_of_text(person.name)
        if pid == JUNK_PID:
            continue
        if pid in by_pid:
            raise DatasetError(
                "same-person-twice",
                f"{by_pid[pid]} and {person} are the same identity {pid}; rename one, or join them",
            )
        by_pid[pid] = person
        found += [(path, pid, camera_of(path.name)) for path in list_images(person)]
    return found


def camera_of(name: str) -> int:
    """Camera as written in a base name, 0 where it says none.

    >>> camera_of("shop_cam12_0001.jpg"), camera_of("0001_c3s1_0002_01.jpg"), camera_of("me.jpg")
    (12, 3, 0)
    """
    match = _CAMERA.search(name)
    return (whole_number(match[1]) or 0) if match else 0


def _as_samples(found: _Found, dataset: str, split: str) -> tuple[Sample, ...]:
    return tuple(
        Sample(str(path), pid, camera, subject_of(dataset, split, pid))
        for path, pid, camera in found
    )


def _load_persons(
    home: Path, dataset: str, problems: list[Problem]
) -> dict[str, tuple[Sample, ...]]:
    persons = _persons_in(home)
    if not persons:
        loose = [path.name for path in list_images(home)]
        if loose:
            raise wrong.no_name_matches(home, loose, "PATH/<pid>/*")
        raise wrong.empty_folder(home, "person")
    samples = _as_samples(_read_persons(persons), dataset, "all")
    parts = divide_persons(samples)
    problems.append(
        Problem(
            "divided",
            f"{home} has no train, query and gallery folders: its {len(persons)} persons were "
            "divided 3 : 1 : 1 into training, validation and test, always alike",
            "note",
        )
    )
    return parts
