"""Your own images in folders: ``folder:PATH``.

Three layouts are read:

* ``PATH/{train,query,gallery}`` (or Market-1501's ``bounding_box_train``, ``query`` and
  ``bounding_box_test``, or VeRi's ``image_train``, ``image_query`` and ``image_test``) with
  Market-style names, and optionally the two validation folders of ``data/train_split.py``;
* the same folders with a sub-folder per person: ``PATH/train/<pid>/*``;
* ``PATH/<pid>/*`` alone: the persons are divided into training, validation and test, 3 : 1 : 1.

An evaluation needs no training folder. Images of a person may be in nested folders. The camera is
read from the file name, or else from a nested folder (``<pid>/cam1/*``); without one it is 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data import problems as wrong
from data.datasets.layout import (
    CAMERA_PATTERN,
    JUNK_PID,
    LoadedData,
    LoadRequest,
    folders_below,
    images_below,
    list_folders,
    list_images,
    parse_camera,
    parse_market_name,
    pid_of_text,
    split_of,
    subject_of,
    whole_number,
)
from data.datasets.market1501 import SPLIT_RECORD, read_folder, recorded_split
from data.images import IMAGE_SUFFIXES, is_litter
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample
from data.splits import divide_persons
from utils.files import composed, existing_path, expanded

_FOLDERS = {
    "train": ("bounding_box_train", "train", "image_train"),
    "val_query": ("bounding_box_val_query", "val_query"),
    "val_gallery": ("bounding_box_val_gallery", "val_gallery"),
    "query": ("query", "image_query"),
    "gallery": ("bounding_box_test", "gallery", "image_test", "test"),
}
_SUBSET_WORDS = {"train", "training", "test", "query", "gallery", "probe", "val", "validation"}
_UNUSED = ("gt_bbox", "gt_query")  # of Market-1501: hand-drawn boxes
_OTHER_IMAGES = frozenset((".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".tga", ".dng"))


def load(request: LoadRequest) -> LoadedData:
    """Load ``folder:PATH``; PATH is relative to the working directory or to the root.

    Raises:
        DatasetError: PATH is not a folder, or has none of the layouts.
    """
    home = resolve(request)
    if not home.is_dir():
        raise not_there(request, f"{home} is not a folder")
    dataset = composed(home.resolve().name)
    if (home / SPLIT_RECORD).is_file():  # subjects are the same before and after a split
        dataset = dataset.removesuffix("_val")
    reader = _Reader(dataset)
    folders = {
        subset: next((home / name for name in names if (home / name).is_dir()), None)
        for subset, names in _FOLDERS.items()
    }
    if any(folders.values()):
        layout, parts = "Market-style folders", _read_subsets(home, folders, reader)
    else:
        layout, parts = "one folder per person", _divide(home, reader)
    notes, split_problems = recorded_split(home, parts)
    return LoadedData(
        DatasetSplits(request.name, **parts, notes={"layout": layout} | notes),
        dataset,
        layout,
        home,
        problems=(*reader.problems, *split_problems, *reader.final_problems(home)),
        identity_names=reader.names,
    )  # fmt: skip


def resolve(request: LoadRequest) -> Path:
    """Return the path after the colon of a name."""
    given = expanded(request.name.partition(":")[2])
    candidates = (existing_path(given), existing_path(request.root / given))
    return next((path for path in candidates if path.exists()), given)


def not_there(request: LoadRequest, what: str) -> DatasetError:
    """Return the error for a path after the colon that does not exist."""
    return DatasetError(
        "not-found",
        f"DATASETS.NAMES {request.name}: {what}; give a path from the working directory or from "
        "DATASETS.ROOT_DIR",
    )


def _read_subsets(
    home: Path, folders: dict[str, Path | None], reader: _Reader
) -> dict[str, tuple[Sample, ...]]:
    lacking = [subset for subset in ("query", "gallery") if folders[subset] is None]
    if lacking:
        raise DatasetError(
            "missing-folder",
            f"{home} lacks {' and '.join(lacking)}; expected train (bounding_box_train), query and "
            "gallery (bounding_box_test)",
        )
    parts: dict[str, tuple[Sample, ...]] = {}
    for subset, folder in folders.items():
        if folder is not None and (subset != "train" or images_below(folder)):
            parts[subset] = reader.read_subset(folder, subset)
    return parts


def _divide(home: Path, reader: _Reader) -> dict[str, tuple[Sample, ...]]:
    """Read ``PATH/<pid>/*`` and divide the persons."""
    persons = _persons_in(home)
    _check_person_folders(home, persons)
    parts = divide_persons(reader.read_persons(persons, "all"))
    reader.problems.append(
        Problem(
            "divided",
            f"{home} has no train, query and gallery folders: its {len(persons)} persons were "
            "divided 3 : 1 : 1 into training, validation and test, the same way every time",
            "note",
        )
    )
    return parts


def _persons_in(folder: Path) -> list[Path]:
    """Return the sub-folders that contain images at any depth."""
    return [person for person in list_folders(folder) if images_below(person)]


def _check_person_folders(home: Path, persons: list[Path]) -> None:
    """Raise an error if the folders in ``PATH`` are not persons."""
    if not persons:
        loose = [path.name for path in list_images(home)]
        if loose:
            raise wrong.no_name_matches(home, loose, "PATH/<pid>/*")
        raise wrong.empty_folder(home, "person")
    subsets = [p.name for p in persons if _SUBSET_WORDS & set(re.split("[^a-z]+", p.name.lower()))]
    if len(subsets) > 1:
        raise DatasetError(
            "unknown-subsets",
            f"{home} has the folders {', '.join(subsets)}, which are not persons; rename them to "
            "train, query and gallery (and val_query and val_gallery)",
        )
    cameras = [p.name for p in persons if re.fullmatch(r"cam(era)?[ _-]?\w{1,3}", p.name.lower())]
    if len(cameras) == len(persons):
        raise DatasetError(
            "cameras-not-persons",
            f"the folders in {home} are cameras ({wrong.examples(cameras)}), not persons; arrange "
            "the images as PATH/<pid>/<camera>/*, or use a table: DATASETS.NAMES csv:FILE",
        )


class _Reader:
    """Reads the folders of a data set and collects what is reported about them."""

    def __init__(self, dataset: str) -> None:
        self.problems: list[Problem] = []
        self.names: dict[int, str] = {}  # of identities that are not numbers, by pid
        self._dataset = dataset
        self._accounted: set[str] = set()
        self._with_camera: list[Path] = []
        self._without_camera: list[Path] = []

    def read_subset(self, folder: Path, subset: str) -> tuple[Sample, ...]:
        """Read Market-style names or sub-folders of persons, whichever has more images."""
        direct = list_images(folder)
        named = sum(parse_market_name(path.name) is not None for path in direct)
        persons = _persons_in(folder)
        if persons and sum(len(images_below(person)) for person in persons) > named:
            return self.read_persons(persons, split_of(subset))
        # Cameras as written: your own cameras may be numbered from 0.
        samples, problems = read_folder(folder, self._dataset, subset, first_camera=0)
        self.problems += problems
        self._accounted.update(map(str, images_below(folder)))  # read_folder reports the others
        return samples

    def read_persons(self, persons: list[Path], split: str) -> tuple[Sample, ...]:
        """Read one folder per person; the folder -1 is junk, and equal numbers are an error."""
        by_pid: dict[int, Path] = {}
        samples = []
        for person in persons:
            name, pid = composed(person.name), pid_of_text(person.name)
            images = images_below(person)
            self._accounted.update(map(str, images))
            if pid == JUNK_PID:
                continue
            if composed(by_pid.setdefault(pid, person).name) != name:
                raise DatasetError(
                    "same-person-twice",
                    f"{by_pid[pid]} and {person} are the same identity {pid}; rename or merge them",
                )
            if whole_number(name) is None:
                self.names[pid] = name
            subject = subject_of(self._dataset, split, pid)
            samples += [
                Sample(str(path), pid, self._camera(path, person), subject) for path in images
            ]
        return tuple(samples)

    def _camera(self, path: Path, person: Path) -> int:
        """Return the camera in the file name, or in the nearest folder below the person's."""
        for part in reversed(path.relative_to(person).parts):
            camera = parse_camera(part)
            if camera is not None:
                self._with_camera.append(path)
                return camera
        self._without_camera.append(path)
        return 0

    def final_problems(self, home: Path) -> Iterator[Problem]:
        """Yield what is known when all folders were read: missing cameras, unused images."""
        if self._with_camera and self._without_camera:
            total = len(self._with_camera) + len(self._without_camera)
            text = (
                f"{len(self._without_camera)} of {total} images have no camera in their names and "
                f"count as camera 0 (for example {self._without_camera[0]}), while others have one "
                f"(for example {self._with_camera[0]}): images of the same camera may count as "
                f"matches across cameras; write the camera as {CAMERA_PATTERN}, or use a table: "
                "DATASETS.NAMES csv:FILE"
            )
            yield Problem("some-without-camera", text)
        suffixes = Counter(
            path.suffix.lower()
            for folder in folders_below(home)
            for path in folder.iterdir()
            if path.suffix.lower() in _OTHER_IMAGES and not is_litter(path.name)
        )
        if suffixes:
            counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
            text = (
                f"{suffixes.total()} images below {home} are left out because their format is not "
                f"read ({counts}); convert them to one of {' '.join(IMAGE_SUFFIXES)}"
            )
            yield Problem("format-not-read", text)
        for name in _UNUSED:
            if (home / name).is_dir():
                self._accounted.update(map(str, images_below(home / name)))
        unused = [path for path in images_below(home) if str(path) not in self._accounted]
        if unused:
            text = (
                f"{len(unused)} images below {home} are not used (for example "
                f"{unused[0].relative_to(home)}); move them into the folder of a person, or away"
            )
            yield Problem("images-left-out", text)
