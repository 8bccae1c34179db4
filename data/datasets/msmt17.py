"""MSMT17's lists: which pictures belong to a subset, and which of them are there.

MSMT17: 15 cameras, 4,101 identities; V1, V2 (faces blurred), or Market-style copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from data import problems as wrong
from data.datasets.layout import (
    Counts,
    LoadedData,
    LoadRequest,
    Origin,
    find_below,
    has_folders,
    list_folders,
    not_found,
    subject_of,
    whole_number,
)
from data.datasets.market1501 import (
    FOLDERS,
    load_validation_tree,
    read_market_tree,
    split_of,
)
from data.images import is_image_name
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
NAME_PATTERN = "PPPP_III_CC_..., such as 0114_019_10_0303noon_0284_2_ex.jpg"


@dataclass(frozen=True)
class Line:
    """One line of a list: a path below train or test, and the identity."""

    path: str
    pid: int
    camera: int


def camera_of(name: str) -> int | None:
    """Camera (from 1) of an original base name: its third field.

    >>> camera_of("0114_019_10_0303noon_0284_2_ex.jpg")
    10
    """
    fields = name.split("_")
    if len(fields) < 4 or any(whole_number(field) is None for field in fields[:3]):
        return None
    return whole_number(fields[2])


def read_list(path: Path) -> list[Line]:
    """Read lines ``0000/0000_000_01_0303morning_0008_0.jpg 0``: the last space divides them.

    Raises:
        DatasetError: The list is missing or empty, or a line is none; the text names it.
    """
    if not path.is_file():
        raise DatasetError(
            "missing-list",
            f"{path} is missing; unpack the archive again, it holds {', '.join(LISTS)}",
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            "bad-list", f"{path} is no UTF-8 text ({error}); copy the original list again"
        ) from error
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip():
            continue
        name, _, last = text.strip().rpartition(" ")
        camera, pid = camera_of(Path(name).name), whole_number(last)
        if camera is None or pid is None or not is_image_name(Path(name).name):
            raise DatasetError(
                "no-name-matches",
                f"{path} line {number} is {text!r}; expected 'PPPP/NAME.jpg PID' with NAME "
                f"{NAME_PATTERN}; copy the original list again",
            )
        lines.append(Line(name.strip(), pid, camera))
    if not lines:
        raise DatasetError("empty-list", f"{path} is empty; copy the original list again")
    return lines


def files_below(folder: Path) -> dict[str, str]:
    """Path as stored, by path in lower case; listing folders beats looking pictures up."""
    return {
        f"{person.name}/{path.name}".lower(): f"{person.name}/{path.name}"
        for person in list_folders(folder)
        for path in person.iterdir()
        if is_image_name(path.name)
    }


TITLE = "MSMT17"
ROOTS = ("MSMT17_V1", "MSMT17_V2", "MSMT17")
PROTOCOLS = ("train", "trainval")
_TEST = {"query": Counts(3_060, 11_659, 15), "gallery": Counts(3_060, 82_161, 15)}
EXPECTED = {
    "train": {"train": Counts(1_041, 30_248, 15), **_TEST},
    "trainval": {"train": Counts(1_041, 32_621, 15), **_TEST},
}
_FIRST_TWO_DIGIT_CAMERA = 10
ORIGIN = Origin(
    TITLE,
    ROOTS,
    f"{', '.join(LISTS)} and train/ and test/, or {', '.join(FOLDERS)}",
    "https://www.pkuvmc.com/dataset.html",
)


class _Folders(NamedTuple):
    layout: str
    train: str
    test: str


_LAYOUTS = (
    _Folders("MSMT17 V2", "mask_train_v2", "mask_test_v2"),
    _Folders("MSMT17 V1", "train", "test"),
)


def load(request: LoadRequest) -> LoadedData:
    """Load ``msmt17``: the whole training set, no validation.

    Raises:
        DatasetError: It is not there, or not what it should be.
    """
    if request.msmt17_protocol not in PROTOCOLS:
        raise DatasetError(
            "unknown-protocol",
            f"MSMT17.PROTOCOL is {request.msmt17_protocol!r}; expected {' or '.join(PROTOCOLS)}",
        )
    folder = find_below(request.root, ROOTS, _is_original)
    if folder is not None:
        return _load_original(folder, request)
    folder = find_below(request.root, ROOTS, lambda f: has_folders(f, FOLDERS))
    if folder is not None:
        return _load_market_style(folder, request)
    _explain_what_is_there(request.root)
    raise not_found(request.root, ORIGIN, _is_any)


def load_validation(request: LoadRequest) -> LoadedData:
    """Load ``msmt17_val``, made by ``data/train_split.py``."""
    return load_validation_tree(request, TITLE)


def _layout_of(folder: Path) -> _Folders | None:
    return next((kind for kind in _LAYOUTS if has_folders(folder, (kind.train, kind.test))), None)


def _has_lists(folder: Path) -> bool:
    return (folder / "list_train.txt").is_file()


def _is_original(folder: Path) -> bool:
    return _has_lists(folder) and _layout_of(folder) is not None


def _is_any(folder: Path) -> bool:
    return _has_lists(folder) or _layout_of(folder) is not None or has_folders(folder, FOLDERS)


def _load_original(folder: Path, request: LoadRequest) -> LoadedData:
    kind = _layout_of(folder)
    assert kind is not None  # noqa: S101 - _is_original has seen them
    lists = {name: read_list(folder / name) for name in _wanted_lists(request.msmt17_protocol)}
    images = {"query": kind.test, "gallery": kind.test}
    sources = {
        "train": [
            line for name in ("list_train.txt", "list_val.txt") for line in lists.get(name, [])
        ],
        "query": lists["list_query.txt"],
        "gallery": lists["list_gallery.txt"],
    }
    problems: list[Problem] = []
    parts = {
        subset: _samples(folder, images.get(subset, kind.train), subset, lines, problems)
        for subset, lines in sources.items()
    }
    protocol = request.msmt17_protocol
    splits = DatasetSplits(
        request.name,
        train=parts["train"],
        query=parts["query"],
        gallery=parts["gallery"],
        notes={"protocol": f"MSMT17, trained on {protocol}"},
    )
    return LoadedData(splits, TITLE, kind.layout, folder, EXPECTED[protocol], tuple(problems))


def _wanted_lists(protocol: str) -> list[str]:
    return [name for name in LISTS if name != "list_val.txt" or protocol == "trainval"]


def _samples(
    folder: Path, images: str, subset: str, lines: list[Line], problems: list[Problem]
) -> tuple[Sample, ...]:
    present = files_below(folder / images)
    missing = [line.path for line in lines if line.path.lower() not in present]
    if missing:
        raise _missing_images(folder, images, subset, missing, len(lines))
    split = split_of(subset)
    names = [present[line.path.lower()] for line in lines]
    shouting = [n for n in names if Path(n).suffix != Path(n).suffix.lower()]
    if shouting:
        problems.append(wrong.upper_case_suffix(folder / images, shouting))
    samples = (
        Sample(
            str(folder / images / name),
            line.pid,
            line.camera - 1,
            subject_of("msmt17", split, line.pid),
        )
        for line, name in zip(lines, names, strict=True)
    )
    return tuple(sorted(samples, key=lambda s: s.path))


def _missing_images(
    folder: Path, images: str, subset: str, missing: list[str], total: int
) -> DatasetError:
    found = (
        f"{len(missing)} of the {total} {subset} pictures listed in {folder} are not in {images}/"
    )
    if images.startswith("mask_"):
        return DatasetError(
            "v2-images-v1-lists",
            f"{found} ({wrong.examples(missing)}): V2 images with V1 lists; copy the list_*.txt "
            "of the MSMT17_V2 archive beside mask_train_v2",
        )
    return DatasetError(
        "images-missing", f"{found} ({wrong.examples(missing)}); unpack the archive again"
    )


def _load_market_style(folder: Path, request: LoadRequest) -> LoadedData:
    splits, problems = read_market_tree(folder, request.base_name)
    highest = max(s.camid + 1 for s in (*splits.train, *splits.query, *splits.gallery))
    if highest < _FIRST_TWO_DIGIT_CAMERA:
        text = (
            f"{folder} names no camera above {highest}, while MSMT17 has 15: whoever made this "
            "copy read one digit of the camera, so camera 14 became 1 and true matches are thrown "
            "away; make it anew from MSMT17_V1 with data/train_split.py"
        )
        problems = (*problems, Problem("one-digit-camera", text))
    # A copy does not say which pictures were list_val's, but their number does.
    whole = len(splits.train) == EXPECTED["trainval"]["train"].images
    protocol = "trainval" if whole else "train"
    if protocol != request.msmt17_protocol:
        text = (
            f"{folder} is a Market-style copy whose training set is that of protocol {protocol}; "
            f"MSMT17.PROTOCOL {request.msmt17_protocol} needs the original MSMT17_V1 or V2 folders"
        )
        problems = (*problems, Problem("protocol-fixed", text))
    splits = replace(
        splits, notes={"protocol": f"MSMT17, trained on {protocol} (Market-style copy)"}
    )
    return LoadedData(splits, TITLE, "Market-style copy", folder, EXPECTED[protocol], problems)


def _explain_what_is_there(root: Path) -> None:
    """Raise the sentence for images in one place and lists in another, or for half a set."""
    images = find_below(root, ROOTS, lambda f: _layout_of(f) is not None)
    lists = find_below(root, ROOTS, _has_lists)
    if images is None:
        return
    kind = _layout_of(images)
    if kind is not None and kind.layout == "MSMT17 V2" and lists is not None:
        raise DatasetError(
            "v2-images-v1-lists",
            f"V2 images in {images} but lists only in {lists}: V2 images with V1 lists; copy the "
            f"four list_*.txt of the MSMT17_V2 archive into {images}",
        )
    raise DatasetError(
        "missing-list",
        f"{images} lacks {', '.join(LISTS)}; unpack the archive again, it holds them",
    )
