"""What every loader takes and returns.

File names: which files are pictures, and who and which camera a name says.

Only the base name counts: a parent folder such as ``exp01_c9`` must not decide about a camera.

Finding a data set below the root folder, and saying what is wrong when it is not there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from data.images import is_image_name, is_litter
from data.problems import DatasetError, Problem, examples
from data.records import DatasetSplits, Sample


@dataclass(frozen=True)
class LoadRequest:
    """What is asked of a loader.

    Attributes:
        name: As asked for, such as ``market1501_val`` or ``folder:PATH``.
        root: Folder that holds the data sets.
        msmt17_protocol: Train on list_train (``train``) or also on list_val (``trainval``).
        cuhk03_kind: Boxes drawn by hand (``labeled``) or found by a detector (``detected``).
        synthetic_options: Keyword arguments of the synthetic set.
        extract_to: Folder for pictures taken out of CUHK03's .mat file; ``None`` puts them where
            everybody has them, ``cuhk03/images_<kind>``.
        list_only: Look, but extract nothing: paths of such pictures may not exist yet.
    """

    name: str
    root: Path
    msmt17_protocol: str = "train"
    cuhk03_kind: str = "labeled"
    synthetic_options: Mapping[str, int] = field(default_factory=dict)
    extract_to: Path | None = None
    list_only: bool = False

    @property
    def base_name(self) -> str:
        """Name without ``_val``: a split does not change whom a key belongs to."""
        return self.name.removesuffix("_val")


@dataclass(frozen=True)
class Counts:
    """Size of one subset."""

    ids: int
    images: int
    cameras: int

    @classmethod
    def of(cls, samples: tuple[Sample, ...]) -> Counts:
        """Count a subset."""
        return cls(len({s.pid for s in samples}), len(samples), len({s.camid for s in samples}))

    def __str__(self) -> str:
        """Show the three numbers in words."""
        return f"{self.ids:,} ids / {self.images:,} images / {self.cameras} cameras"


@dataclass(frozen=True)
class LoadedData:
    """What a loader found.

    Attributes:
        splits: The samples.
        title: Name for people, such as ``Market1501``.
        layout: Which of the known layouts it is.
        folder: Where it lies.
        expected: Published size per subset; empty where there is none to hold it against.
        problems: What was found wrong but can be lived with.
        market_names: Market-style name by path, for pictures whose own name is none.
    """

    splits: DatasetSplits
    title: str
    layout: str
    folder: Path
    expected: Mapping[str, Counts] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    market_names: Mapping[str, str] = field(default_factory=dict)

    def with_problems(self, *problems: Problem) -> LoadedData:
        """Return the same with more problems."""
        return replace(self, problems=(*self.problems, *problems))


Loader = Callable[[LoadRequest], LoadedData]

SUBSETS = ("train", "val_query", "val_gallery", "query", "gallery")


def subject_of(dataset: str, split: str, pid: int) -> str:
    """Label a person is encrypted under; ``split`` is ``train`` (with validation) or ``test``."""
    return f"{dataset}/{split}/{pid}"


MARKET_PATTERN = "PPPP_cC[sS]_..., such as 0002_c1s1_000451_03.jpg"

# The separator after the digits is what keeps camera 14 from being read as camera 1.
_MARKET = re.compile(r"(?P<pid>-?\d+)_c(?P<camera>\d+)(?:s\d+)?_")
_TOO_LARGE = 2**63  # identities and cameras become int64


class PersonAndCamera(NamedTuple):
    """What a file name says; ``camera`` as written, which is from 1 in the public sets."""

    pid: int
    camera: int


def parse_market_name(name: str) -> PersonAndCamera | None:
    """Read identity and camera of a Market-style base name, ``None`` if it is not one.

    >>> parse_market_name("-1_c3s1_000551_04.jpg")
    PersonAndCamera(pid=-1, camera=3)
    >>> parse_market_name("0000_c14_0030.jpg").camera
    14
    """
    match = _MARKET.match(Path(name).name)
    if match is None:
        return None
    found = PersonAndCamera(int(match["pid"]), int(match["camera"]))
    return found if max(abs(found.pid), found.camera) < _TOO_LARGE else None


def list_images(folder: Path) -> list[Path]:
    """List the pictures directly in a folder, sorted by name whatever the file system's order."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if is_image_name(e.name) and _is_file_or_dead_link(e)]
    return [folder / name for name in sorted(names)]


def _is_file_or_dead_link(entry: os.DirEntry[str]) -> bool:
    """Tell files, and links whose target is gone: opened, they get their name in an error.

    Left out here, the pictures of a split whose source was moved would be missed in silence.
    """
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:  # a link that leads round in a circle
        return True


def list_folders(folder: Path) -> list[Path]:
    """List the sub-folders of a folder, sorted, without hidden ones and ``__MACOSX``."""
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name for entry in entries if not is_litter(entry.name) and entry.is_dir()
            ]
    except OSError:  # unreadable, or gone meanwhile: nothing to find there
        return []
    return [folder / name for name in sorted(names)]


def upper_case_names(paths: list[Path]) -> list[str]:
    """Base names whose suffix is not in lower case."""
    return [path.name for path in paths if path.suffix != path.suffix.lower()]


def whole_number(text: str) -> int | None:
    """Read digits, of any script, that an int64 holds; None for anything else.

    >>> whole_number("0042"), whole_number("4²"), whole_number("9" * 30), whole_number("")
    (42, None, None, None)
    """
    # isdigit would let superscripts through, which int refuses.
    if not text.isdecimal() or len(text) > 19 or int(text) >= _TOO_LARGE:
        return None
    return int(text)


def pid_of_text(text: str) -> int:
    """Turn an identity written in any way into a number that never changes.

    Digits are taken as they are, as far as an int64 holds them; a name becomes a number above 2**32
    from its SHA-256, so adding a person later moves nobody else's number, and with it nobody's key.

    >>> pid_of_text("0042")
    42
    >>> pid_of_text("alice") == pid_of_text("alice") > 2**32
    True
    """
    text = text.strip()
    if re.fullmatch(r"-?[0-9]{1,19}", text) and abs(int(text)) < _TOO_LARGE:
        return int(text)
    # Names of folders may hold bytes that are no UTF-8.
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return 2**32 + int.from_bytes(digest[:7], "big") // 2  # stays below 2**62: an int64 holds it


Test = Callable[[Path], bool]


def has_folders(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has all of these sub-folders."""
    return all((folder / name).is_dir() for name in names)


def named_children(root: Path, names: Sequence[str]) -> list[Path]:
    """Sub-folders with one of these names in any case, in the order of the names."""
    children = list_folders(root)
    return [child for name in names for child in children if child.name.lower() == name.lower()]


def search_below(start: Path, test: Test, depth: int) -> Path | None:
    """First folder that passes, breadth first: ``start``, then up to ``depth`` levels below."""
    level = [start]
    for _ in range(depth + 1):
        for folder in level:
            if test(folder):
                return folder
        level = [child for folder in level for child in list_folders(folder)]
    return None


def find_below(root: Path, names: Sequence[str], test: Test, depth: int = 2) -> Path | None:
    """First folder that passes ``test`` in or below a child of ``root`` with one of the names.

    Args:
        root: Folder that holds the data sets.
        names: Names the data set's folder goes by, preferred first.
        test: Whether a folder is the data set.
        depth: How many folders may be nested between (archives unpacked into archives).
    """
    for child in named_children(root, names):
        found = search_below(child, test, depth)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Origin:
    """What to tell somebody who lacks a data set.

    Attributes:
        title: Name for people.
        names: Names its folder goes by, preferred first.
        needs: What its folder has to hold, in words.
        page: Where its authors hand it out.
    """

    title: str
    names: tuple[str, ...]
    needs: str
    page: str


def not_found(root: Path, origin: Origin, test: Test) -> DatasetError:
    """Explain why ``find_below`` found nothing: no root, wrong level, or not there.

    Args:
        root: Folder that was searched.
        origin: What was looked for.
        test: Whether a folder is (at least a part of) the data set.
    """
    if not root.is_dir():
        return DatasetError(
            "no-root",
            f"DATASETS.ROOT_DIR {root} is not a folder; give the one that holds {origin.names[0]}/",
        )
    return (
        _too_deep(root, origin.title, origin.names, test)
        or _too_high(root, origin.title, origin.names, test)
        or _absent(root, origin)
    )


def _too_deep(root: Path, title: str, names: Sequence[str], test: Test) -> DatasetError | None:
    root = root.resolve()
    lower = {name.lower() for name in names}
    for folder in (root, root.parent):
        if not test(folder):
            continue
        known = next((f for f in (folder, folder.parent) if f.name.lower() in lower), None)
        if known is not None:
            remedy = f"give the folder above: DATASETS.ROOT_DIR {known.parent}"
        elif folder == root.parent:
            continue  # that folders named alike lie beside the root says nothing
        else:
            remedy = (
                f"rename it to {names[0]} and give the folder above (DATASETS.ROOT_DIR "
                f"{folder.parent}), or use it as one's own data: DATASETS.NAMES folder:{folder}"
            )
        return DatasetError(
            "wrong-root", f"DATASETS.ROOT_DIR {root} is one level too deep for {title}; {remedy}"
        )
    return None


def _too_high(root: Path, title: str, names: Sequence[str], test: Test) -> DatasetError | None:
    for child in list_folders(root):
        candidates = [child, *list_folders(child)]
        for folder in candidates:
            if find_below(folder, names, test) is not None:
                return DatasetError(
                    "wrong-root",
                    f"DATASETS.ROOT_DIR {root} is one level too high for {title}; "
                    f"give DATASETS.ROOT_DIR {folder}",
                )
    return None


def _absent(root: Path, origin: Origin) -> DatasetError:
    found = [child.name + "/" for child in list_folders(root)]
    return DatasetError(
        "not-found",
        f"{origin.title} is not in {root}: expected {' or '.join(f'{n}/' for n in origin.names)} "
        f"with {origin.needs}; found {examples(found, 6) if found else 'no folder'}; nothing is "
        f"downloaded here: its authors give it for research, on their terms, at {origin.page}",
    )
