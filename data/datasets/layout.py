"""What all data set loaders use: their input and output, file names, and the search for folders.

Only the base name of a path counts: a parent folder such as ``exp01_c9`` has no effect.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from data.images import is_image_name, is_litter
from data.problems import DatasetError, Problem, examples
from data.records import DatasetSplits, Sample
from utils.files import composed

SUBSETS = ("train", "val_query", "val_gallery", "query", "gallery")
JUNK_PID = -1
MARKET_PATTERN = "PPPP_cC[sS]_..., such as 0002_c1s1_000451_03.jpg"
CAMERA_PATTERN = "_c3_, cam3_, camera_3 or camA_, such as shop_cam3_0001.jpg"


@dataclass(frozen=True)
class LoadRequest:
    """The input of a loader."""

    name: str  # as in DATASETS.NAMES, for example ``market1501_val`` or ``folder:PATH``
    root: Path  # folder that contains the data sets
    # train on list_train (``train``) or also on list_val (``trainval``)
    msmt17_protocol: str = "train"
    # boxes drawn by hand (``labeled``) or found by a detector (``detected``)
    cuhk03_kind: str = "labeled"
    # keyword arguments of the synthetic set
    synthetic_options: Mapping[str, int] = field(default_factory=dict)
    # folder for images extracted from CUHK03's .mat file; None: the usual ``cuhk03/images_<kind>``
    extract_to: Path | None = None
    list_only: bool = False  # extract nothing; paths of images in a .mat file need not exist

    @property
    def base_name(self) -> str:
        """Name without ``_val``; subjects are the same before and after a split."""
        return self.name.removesuffix("_val")


@dataclass(frozen=True)
class Counts:
    """Size of one subset."""

    ids: int
    images: int
    cameras: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Counts:
        """Count identities, images and cameras."""
        return cls(len({s.pid for s in samples}), len(samples), len({s.camid for s in samples}))

    def __str__(self) -> str:
        """Return the three numbers with their units."""
        return f"{self.ids:,} ids / {self.images:,} images / {self.cameras} cameras"


@dataclass(frozen=True)
class LoadedData:
    """The output of a loader."""

    splits: DatasetSplits  # the samples
    title: str  # name in messages, such as ``Market1501``
    layout: str  # the layout that was found
    folder: Path  # the folder of the data set
    # published size per subset; empty without a published size
    expected: Mapping[str, Counts] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()  # problems that do not prevent the use of the data set
    # Market-style name by path, for images with other names
    market_names: Mapping[str, str] = field(default_factory=dict)
    # identity as written in the data, by pid, where it is not a number
    identity_names: Mapping[int, str] = field(default_factory=dict)

    def with_problems(self, *problems: Problem) -> LoadedData:
        """Return the same data with more problems."""
        return replace(self, problems=(*self.problems, *problems))


Loader = Callable[[LoadRequest], LoadedData]


def split_of(subset: str) -> str:
    """Return ``train`` or ``test``, the second field of a subject; validation is part of train."""
    return "test" if subset in ("query", "gallery") else "train"


def subject_of(dataset: str, split: str, pid: int) -> str:
    """Return the subject of a person; ``split`` as returned by :func:`split_of`."""
    return f"{dataset}/{split}/{pid}"


# --- Names of files and identities

# The separator after the digits prevents reading camera 14 as camera 1.
_MARKET = re.compile(r"(?P<pid>-?\d+)_c(?P<camera>\d+)(?:s\d+)?_")
_CAMERA = re.compile(
    r"(?:^|[^a-z0-9])(?:(?:camera|cam|c)[ _-]?(?P<number>\d+)(?:s\d+)?|"
    r"(?:camera|cam)[ _-]?(?P<letter>[a-z]))(?=[^a-z0-9]|$)",
    re.IGNORECASE,
)
_TOO_LARGE = 2**63  # identities and cameras become int64
_LARGEST_EXACT_FLOAT = 2**53


class PersonAndCamera(NamedTuple):
    """Identity and camera in a file name; ``camera`` as written, from 1 in the public sets."""

    pid: int
    camera: int


def parse_market_name(name: str) -> PersonAndCamera | None:
    """Return identity and camera of a Market-style base name; None for other names.

    >>> parse_market_name("-1_c3s1_000551_04.jpg")
    PersonAndCamera(pid=-1, camera=3)
    >>> parse_market_name("0000_c14_0030.jpg").camera
    14
    """
    match = _MARKET.match(Path(name).name)
    if match is None:
        return None
    parsed = PersonAndCamera(int(match["pid"]), int(match["camera"]))
    return parsed if max(abs(parsed.pid), parsed.camera) < _TOO_LARGE else None


def parse_camera(name: str) -> int | None:
    """Return the camera in the name of a file or folder as written; letters count from A = 1.

    >>> [parse_camera(name) for name in ("shop_cam12_1.jpg", "C01-0.jpg", "camB_0.jpg", "me.jpg")]
    [12, 1, 2, None]
    """
    match = _CAMERA.search(name)
    if match is None:
        return None
    if match["letter"]:
        return ord(match["letter"].lower()) - ord("a") + 1
    return whole_number(match["number"])


def whole_number(text: str) -> int | None:
    """Return the value of decimal digits of any script that fits into an int64, else None.

    >>> whole_number("0042"), whole_number("4²"), whole_number("9" * 30), whole_number("")
    (42, None, None, None)
    """
    # isdigit would accept superscripts, on which int raises an error.
    if not text.isdecimal() or len(text) > 19 or int(text) >= _TOO_LARGE:
        return None
    return int(text)


def without_decimals(text: str) -> str:
    """Return a whole number without its decimals, as pandas writes columns with missing values.

    >>> without_decimals("7.0"), without_decimals("-1.0"), without_decimals("7.5")
    ('7', '-1', '7.5')
    """
    if re.fullmatch(r"[+-]?[0-9]+(?:\.0*)?(?:[eE][+-]?[0-9]+)?", text) and not text.isdigit():
        value = float(text)
        if value.is_integer() and abs(value) < _LARGEST_EXACT_FLOAT:
            return str(int(value))
    return text


def pid_of_text(text: str) -> int:
    """Return the pid of an identity that is written as a number or a name.

    Digits are the number itself, if an int64 holds it. A name becomes a number above 2**32 from the
    SHA-256 of its NFC form. So a new person does not change the pid, and the key, of another one.

    >>> pid_of_text("0042")
    42
    >>> pid_of_text("alice") == pid_of_text("alice") > 2**32
    True
    """
    text = composed(text.strip())
    if re.fullmatch(r"-?[0-9]{1,19}", text) and abs(int(text)) < _TOO_LARGE:
        return int(text)
    # Folder names may contain bytes that are not UTF-8.
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return 2**32 + int.from_bytes(digest[:7], "big") // 2  # below 2**62, so an int64 holds it


# --- Folders and their images


def list_images(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted by name."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if is_image_name(e.name) and _is_file_or_dead_link(e)]
    return [folder / name for name in sorted(names)]


def _is_file_or_dead_link(entry: os.DirEntry[str]) -> bool:
    """Return True for files and for links without a target.

    Opening a dead link gives an error that names it. If it were left out here, the images of a
    split whose source was moved would be missing without a message.
    """
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:  # a circle of links
        return True


def list_folders(folder: Path) -> list[Path]:
    """Return the sub-folders of a folder, sorted by name, without litter."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not is_litter(e.name) and e.is_dir()]
    except OSError:  # not readable, or deleted meanwhile
        return []
    return [folder / name for name in sorted(names)]


def folders_below(folder: Path) -> Iterator[Path]:
    """Yield a folder and all its sub-folders, sorted, without litter.

    Links to folders are followed; a folder in a circle of links is yielded once.
    """
    visited: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) not in visited:
            visited.add((status.st_dev, status.st_ino))
            yield current
            waiting += reversed(list_folders(current))


def images_below(folder: Path) -> list[Path]:
    """Return the images in a folder and all its sub-folders, sorted within each folder."""
    return [path for current in folders_below(folder) for path in list_images(current)]


# --- The search for the folder of a data set

Test = Callable[[Path], bool]


def has_folders(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder has all of these sub-folders."""
    return all((folder / name).is_dir() for name in names)


def named_children(root: Path, names: Sequence[str]) -> list[Path]:
    """Return sub-folders with one of these names in any case, in the order of the names."""
    children = list_folders(root)
    return [child for name in names for child in children if child.name.lower() == name.lower()]


def search_below(start: Path, test: Test, depth: int) -> Path | None:
    """Return the first folder that passes, breadth first, up to ``depth`` levels below."""
    level = [start]
    for _ in range(depth + 1):
        for folder in level:
            if test(folder):
                return folder
        level = [child for folder in level for child in list_folders(folder)]
    return None


def find_below(root: Path, names: Sequence[str], test: Test, depth: int = 2) -> Path | None:
    """Return the first folder that passes ``test`` in or below a child of ``root``.

    The child has one of the names, of which the first is preferred. Archives that were unpacked
    into archives are found up to ``depth`` levels below it.
    """
    matches = (search_below(child, test, depth) for child in named_children(root, names))
    return next((match for match in matches if match is not None), None)


@dataclass(frozen=True)
class Origin:
    """What to report to a user who does not have a data set."""

    title: str  # name in messages
    names: tuple[str, ...]  # names of its folder, preferred first
    needs: str  # what its folder must contain
    page: str  # web page of its authors


def not_found(root: Path, origin: Origin, test: Test) -> DatasetError:
    """Return the error for an unsuccessful ``find_below``: no root, wrong level, or not there.

    ``test`` returns whether a folder is at least a part of the data set.
    """
    if not root.is_dir():
        return DatasetError(
            "no-root",
            f"DATASETS.ROOT_DIR {root} is not a folder; give the one that contains "
            f"{origin.names[0]}/",
        )
    return _too_deep(root, origin, test) or _too_high(root, origin, test) or _absent(root, origin)


def _too_deep(root: Path, origin: Origin, test: Test) -> DatasetError | None:
    root = root.resolve()
    lower = {name.lower() for name in origin.names}
    for folder in (root, root.parent):
        if not test(folder):
            continue
        known = next((f for f in (folder, folder.parent) if f.name.lower() in lower), None)
        if known is not None:
            fix = f"give the folder above: DATASETS.ROOT_DIR {known.parent}"
        elif folder == root.parent:
            continue  # folders of these names next to the root prove nothing
        else:
            fix = (
                f"rename it to {origin.names[0]} and give the folder above (DATASETS.ROOT_DIR "
                f"{folder.parent}), or load it as your own data: DATASETS.NAMES folder:{folder}"
            )
        text = f"DATASETS.ROOT_DIR {root} is one level too deep for {origin.title}; {fix}"
        return DatasetError("wrong-root", text)
    return None


def _too_high(root: Path, origin: Origin, test: Test) -> DatasetError | None:
    for child in list_folders(root):
        for folder in [child, *list_folders(child)]:
            if find_below(folder, origin.names, test) is not None:
                text = (
                    f"DATASETS.ROOT_DIR {root} is one level too high for {origin.title}; "
                    f"give DATASETS.ROOT_DIR {folder}"
                )
                return DatasetError("wrong-root", text)
    return None


def _absent(root: Path, origin: Origin) -> DatasetError:
    present = [child.name + "/" for child in list_folders(root)]
    return DatasetError(
        "not-found",
        f"{origin.title} is not in {root}: expected {' or '.join(f'{n}/' for n in origin.names)} "
        f"with {origin.needs}; found {examples(present, 6) if present else 'no folder'}; nothing "
        f"is downloaded; its authors provide it for research, on their terms, at {origin.page}",
    )
