"""The synthetic data set: drawn people, none of whom exists, in the layout of Market-1501.

It is created when it is first used, in seconds, and is identical byte for byte for the same
parameters and library versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data.datasets.market1501 import VALIDATION_FOLDERS
from data.people.appearance import draw_people
from data.people.photograph import MAX_CAMERAS, Walk, draw_walks
from utils.errors import UserError
from utils.files import staged_folder
from utils.logger import Progress

DRAWING_VERSION = 3  # increase it with every change of a pixel
_MAX_IDENTITIES = 4000  # with validation and test identities within PPPP
_MAX_IMAGES = 50
_RECORD = "synthetic.json"
FOLDERS = tuple(VALIDATION_FOLDERS.values())
TRAIN, VAL_QUERY, VAL_GALLERY, QUERY, GALLERY = FOLDERS

_README = """\
The people in these images are drawn by code. None of them exists, and no photograph was used.

Layout and names are those of Market-1501 (PPPP_cCsS_FFFFFF_BB.jpg: identity, camera, sequence,
frame, box); 128 x 64 JPEG. Identities of training, validation and test are disjoint; pid 0 are
distractors. Validation and test have one query per identity and camera, and their other images as
gallery. Parameters and counts: synthetic.json. You may delete this folder; it is created again.
"""


@dataclass(frozen=True)
class SyntheticOptions:
    """Size and seed of a synthetic set."""

    # training identities; a quarter as many for validation, half as many for test
    identities: int = 64
    cameras: int = 6  # number of cameras; every identity has images from all of them
    images: int = 4  # images per identity and camera
    seed: int = 1

    def __post_init__(self) -> None:
        """Raise UserError for all values that are out of range."""
        ranges = {
            "identities": (2, _MAX_IDENTITIES),
            "cameras": (2, MAX_CAMERAS),
            "images": (2, _MAX_IMAGES),
            "seed": (0, 2**31 - 1),
        }
        problems = [
            f"synthetic {name} is {value!r}; expected an integer from {low} to {high}"
            for name, (low, high) in ranges.items()
            if isinstance(value := getattr(self, name), bool)
            or not isinstance(value, int)
            or not low <= value <= high
        ]
        if problems:
            raise UserError("; ".join(problems))

    @property
    def counts(self) -> dict[str, int]:
        """Number of identities of train, val and test, and of distractor images."""
        return {
            "train": self.identities,
            "val": max(2, self.identities // 4),
            "test": max(4, self.identities // 2),
            "distractors": max(self.cameras, self.identities // 2 * self.cameras // 4),
        }

    @property
    def folder(self) -> str:
        """Name of the folder; it contains the version of the drawing, the size and the seed."""
        return (
            f"synthetic-v{DRAWING_VERSION}-{self.identities}x{self.cameras}x{self.images}"
            f"-seed{self.seed}"
        )


def ensure_synthetic(root: Path, **size: int) -> Path:
    """Return the folder of a synthetic set below ``root``; draw it if it does not exist.

    ``size`` has fields of `SyntheticOptions`.

    Raises:
        UserError: A parameter is out of range, or images of an existing set are missing.
        OSError: ``root`` cannot be written.
    """
    options = SyntheticOptions(**size)
    final = root / options.folder
    if final.exists():
        check_complete(final)
        return final
    try:
        with staged_folder(final) as temporary:
            _write_set(temporary, options)
    except UserError:
        if not final.exists():  # otherwise another process was faster
            raise
    check_complete(final)
    return final


def draw_folders(target: Path, options: SyntheticOptions) -> None:
    """Draw people into ``target/{train,query,gallery}/PPPP``, the layout of ``folder:target``.

    The test identities follow the training identities. Each has one query per camera. Validation
    identities and distractors are not drawn.

    Raises:
        UserError: ``target`` exists.
        OSError: Nothing can be written there.
    """
    if target.exists():
        raise UserError(f"{target} exists; give the name of a new folder")
    train, test = options.counts["train"], options.counts["test"]
    parts = [("train", "train")] * train + [("query", "gallery")] * test
    people = draw_people(options.seed, len(parts))
    walks = []
    for camera in range(options.cameras):
        for number, names in enumerate(parts):
            first, rest = (f"{name}/{number + 1:04d}" for name in names)
            walk = Walk(people[number], number + 1, number, camera, first, rest, options.images)
            walks.append(walk)
    with staged_folder(target) as staging:
        for folder in {name for walk in walks for name in (walk.first, walk.rest)}:
            (staging / folder).mkdir(parents=True)
        _draw(staging, walks, options.seed)


def check_complete(folder: Path) -> None:
    """Compare the number of images of a set with its record.

    Raises:
        UserError: They differ, or there is no record.
    """
    fix = f"delete {folder} and it is created again"
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no readable {_RECORD}; {fix}") from error
    counts = _count_images(folder)
    if counts != record:
        raise UserError(f"{folder} has {counts} images; expected {record}; {fix}")


def _count_images(folder: Path) -> dict[str, int]:
    return {name: sum(1 for _ in (folder / name).glob("*.jpg")) for name in FOLDERS}


def _write_set(folder: Path, options: SyntheticOptions) -> None:
    for name in FOLDERS:
        (folder / name).mkdir()
    _draw(folder, list(_plan(options)), options.seed)
    (folder / "README.txt").write_text(_README, encoding="utf-8")
    record = {
        "drawing_version": DRAWING_VERSION,
        "parameters": asdict(options),
        "identities": options.counts,
        "images": _count_images(folder),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _draw(folder: Path, walks: list[Walk], seed: int) -> None:
    with Progress(sum(walk.images for walk in walks), "Drawing people") as progress:
        for done in draw_walks(folder, walks, seed):
            progress.update(done)


def _plan(options: SyntheticOptions) -> Iterator[Walk]:
    """Yield all walks, sorted by camera, so that each process draws few scenes."""
    counts = options.counts
    kept = counts["train"] + counts["val"] + counts["test"]
    people = draw_people(options.seed, kept + counts["distractors"])
    folders = (
        [(TRAIN, TRAIN)] * counts["train"]
        + [(VAL_QUERY, VAL_GALLERY)] * counts["val"]
        + [(QUERY, GALLERY)] * counts["test"]
    )
    for camera in range(options.cameras):
        for number, (first, rest) in enumerate(folders):
            person = people[number]
            yield Walk(person, number + 1, number, camera, first, rest, options.images)
        for number in range(kept + camera, len(people), options.cameras):
            yield Walk(people[number], 0, number, camera, GALLERY, GALLERY, 1)
