"""The embedded data set: drawn people in the layout of Market-1501.

Nobody in it exists. It is made where it is first asked for, takes seconds, and is the same, byte
for byte, for the same parameters and library versions.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data.people.appearance import draw_people
from data.people.cameras import MAX_CAMERAS
from data.people.photograph import Walk, draw_walks
from utils.errors import UserError
from utils.progress import Progress

DRAWING_VERSION = 3  # raise it with every change that moves a pixel
_MAX_IDENTITIES = 4000  # with validation and test identities within PPPP
_MAX_IMAGES = 50
_RECORD = "synthetic.json"
_TEMPORARY = ".synthetic-unfinished-"
_STALE_S = 86_400.0
TRAIN, VAL_QUERY, VAL_GALLERY, QUERY, GALLERY = (
    "bounding_box_train", "bounding_box_val_query", "bounding_box_val_gallery",
    "query", "bounding_box_test",
)  # fmt: skip
FOLDERS = (TRAIN, VAL_QUERY, VAL_GALLERY, QUERY, GALLERY)

_README = """\
The people in these pictures are drawn by code. None of them exists, and no photograph was used.

Layout and names are those of Market-1501 (PPPP_cCsS_FFFFFF_BB.jpg: identity, camera, sequence,
frame, box); 128 x 64 JPEG. Identities of training, validation and test are disjoint; pid 0 are
distractors. Validation and test have one query per identity and camera, and their other pictures as
gallery. Parameters and counts: synthetic.json. Delete this folder at will; it is made again.
"""


@dataclass(frozen=True)
class SyntheticOptions:
    """Size and seed of a synthetic set.

    Attributes:
        identities: Training identities; a quarter as many for validation, half as many for test.
        cameras: Cameras, each seeing everybody.
        images: Pictures per identity and camera.
        seed: Seed of everything drawn.
    """

    identities: int = 64
    cameras: int = 6
    images: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        """Check the ranges; raises UserError with all that is wrong."""
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
        """Identities of train, val and test, and pictures of distractors."""
        return {
            "train": self.identities,
            "val": max(2, self.identities // 4),
            "test": max(4, self.identities // 2),
            "distractors": max(self.cameras, self.identities // 2 * self.cameras // 4),
        }

    @property
    def folder(self) -> str:
        """Name of the folder: another size, seed or drawing is another one."""
        return (
            f"synthetic-v{DRAWING_VERSION}-{self.identities}x{self.cameras}x{self.images}"
            f"-seed{self.seed}"
        )


def ensure_synthetic(
    root: Path, *, identities: int = 64, cameras: int = 6, images: int = 4, seed: int = 1
) -> Path:
    """Make the synthetic set below ``root`` unless it is there already.

    Safe against being killed (nothing half-made ever has the final name) and against several
    processes making the same set at once (the first to finish wins, the others use its files).

    Args:
        root: Folder of the data sets; made where it is missing.
        identities: Training identities; validation and test have others of their own.
        cameras: Cameras, each seeing everybody.
        images: Pictures per identity and camera.
        seed: Seed of everything drawn.

    Returns:
        The set's folder.

    Raises:
        UserError: For a parameter out of range, or where pictures of a finished set are gone.
        OSError: Where ``root`` cannot be written.
    """
    options = SyntheticOptions(identities, cameras, images, seed)
    root = Path(root)
    final = root / options.folder
    if final.exists():
        check_complete(final)
        return final
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=root))
    try:
        _write_set(temporary, options)
        temporary.chmod(0o755)
        try:
            temporary.rename(final)
        except OSError:  # another process was first
            if not final.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    check_complete(final)
    return final


def check_complete(folder: Path) -> None:
    """Compare the pictures of a set with the record that was written after them.

    Raises:
        UserError: They differ, or there is no record; it names the remedy.
    """
    remedy = f"delete {folder} and it is made again"
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no readable {_RECORD}; {remedy}") from error
    found = _count_pictures(folder)
    if found != record:
        raise UserError(f"{folder} has {found} pictures; expected {record}; {remedy}")


def _count_pictures(folder: Path) -> dict[str, int]:
    return {name: sum(1 for _ in (folder / name).glob("*.jpg")) for name in FOLDERS}


def _sweep(root: Path) -> None:
    """Remove what runs that were killed left behind; a day is longer than any set takes."""
    for left in root.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)


def _write_set(folder: Path, options: SyntheticOptions) -> None:
    for name in FOLDERS:
        (folder / name).mkdir()
    walks = list(_plan(options))
    total = sum(walk.images for walk in walks)
    with Progress(total, "Drawing people") as progress:
        for done in draw_walks(folder, walks, options.seed):
            progress.update(done)
    (folder / "README.txt").write_text(_README, encoding="utf-8")
    record = {
        "drawing_version": DRAWING_VERSION,
        "parameters": asdict(options),
        "identities": options.counts,
        "images": _count_pictures(folder),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _plan(options: SyntheticOptions) -> Iterator[Walk]:
    """Yield every walk, camera by camera, so that a process draws few scenes."""
    counts = options.counts
    kept = counts["train"] + counts["val"] + counts["test"]
    people = draw_people(options.seed, kept + counts["distractors"])
    places = (
        [(TRAIN, TRAIN)] * counts["train"]
        + [(VAL_QUERY, VAL_GALLERY)] * counts["val"]
        + [(QUERY, GALLERY)] * counts["test"]
    )
    for camera in range(options.cameras):
        for number, (first, rest) in enumerate(places):
            person = people[number]
            yield Walk(person, number + 1, number, camera, first, rest, options.images)
        for number in range(kept + camera, len(people), options.cameras):
            yield Walk(people[number], 0, number, camera, GALLERY, GALLERY, 1)
