"""MSMT17: 15 cameras, 4,101 identities; V1, V2 (blurred faces), and Market-style copies.

The original folders contain lists of the images of each subset.
"""

from __future__ import annotations

from dataclasses import replace
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
    split_of,
    subject_of,
    whole_number,
)
from data.datasets.market1501 import FOLDERS, TEST_FOLDERS, read_market_tree
from data.images import is_image_name
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

TITLE = "MSMT17"
ROOTS = ("MSMT17_V1", "MSMT17_V2", "MSMT17")
PROTOCOLS = ("train", "trainval")
LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
NAME_PATTERN = "PPPP_III_CC_..., such as 0114_019_10_0303noon_0284_2_ex.jpg"
ORIGIN = Origin(
    TITLE,
    ROOTS,
    f"{', '.join(LISTS)} and train/ and test/, or {', '.join(FOLDERS)}",
    "https://www.pkuvmc.com/dataset.html",
)
_TEST = {"query": Counts(3_060, 11_659, 15), "gallery": Counts(3_060, 82_161, 15)}
EXPECTED = {
    "train": {"train": Counts(1_041, 30_248, 15), **_TEST},
    "trainval": {"train": Counts(1_041, 32_621, 15), **_TEST},
}
_FIRST_TWO_DIGIT_CAMERA = 10


class _Folders(NamedTuple):
    layout: str
    train: str
    test: str


_LAYOUTS = (
    _Folders("MSMT17 V2", "mask_train_v2", "mask_test_v2"),
    _Folders("MSMT17 V1", "train", "test"),
)


class Line(NamedTuple):
    """One line of a list."""

    path: str  # relative to train or test
    pid: int
    camera: int  # from 1


def load(request: LoadRequest) -> LoadedData:
    """Load ``msmt17``: the whole training set, without a validation split.

    Raises:
        DatasetError: It was not found, or is not complete.
    """
    if request.msmt17_protocol not in PROTOCOLS:
        raise DatasetError(
            "unknown-protocol",
            f"MSMT17.PROTOCOL is {request.msmt17_protocol!r}; expected {' or '.join(PROTOCOLS)}",
        )
    folder = find_below(request.root, ROOTS, _is_original)
    if folder is not None:
        return _load_original(folder, request)
    folder = find_below(request.root, ROOTS, lambda f: has_folders(f, TEST_FOLDERS))
    if folder is not None:
        return _load_market_style(folder, request)
    _explain_incomplete(request.root)
    raise not_found(request.root, ORIGIN, _is_any)


def _layout_of(folder: Path) -> _Folders | None:
    return next((f for f in _LAYOUTS if has_folders(folder, (f.train, f.test))), None)


def _has_lists(folder: Path) -> bool:
    return (folder / "list_train.txt").is_file()


def _is_original(folder: Path) -> bool:
    return _has_lists(folder) and _layout_of(folder) is not None


def _is_any(folder: Path) -> bool:
    return _has_lists(folder) or _layout_of(folder) is not None or has_folders(folder, TEST_FOLDERS)


def _load_original(folder: Path, request: LoadRequest) -> LoadedData:
    layout = _layout_of(folder)
    assert layout is not None  # noqa: S101 - because _is_original(folder)
    protocol = request.msmt17_protocol
    wanted = [name for name in LISTS if name != "list_val.txt" or protocol == "trainval"]
    lists = {name: read_list(folder / name) for name in wanted}
    sources = {
        "train": (layout.train, lists["list_train.txt"] + lists.get("list_val.txt", [])),
        "query": (layout.test, lists["list_query.txt"]),
        "gallery": (layout.test, lists["list_gallery.txt"]),
    }
    problems: list[Problem] = []
    parts = {
        subset: _samples(folder, images, subset, lines, problems)
        for subset, (images, lines) in sources.items()
    }
    notes = {"protocol": f"MSMT17, trained on {protocol}"}
    splits = DatasetSplits(request.name, **parts, notes=notes)
    return LoadedData(splits, TITLE, layout.layout, folder, EXPECTED[protocol], tuple(problems))


def read_list(path: Path) -> list[Line]:
    """Read lines such as ``0000/0000_000_01_0303morning_0008_0.jpg 0``, split at the last space.

    Raises:
        DatasetError: The list is missing or empty, or a line is invalid; the text contains it.
    """
    if not path.is_file():
        raise DatasetError(
            "missing-list",
            f"{path} is missing; unpack the archive again, it contains {', '.join(LISTS)}",
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            "bad-list", f"{path} is not UTF-8 text ({error}); copy the original list again"
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


def camera_of(name: str) -> int | None:
    """Return the camera (from 1) of an original base name, its third field; None for other names.

    >>> camera_of("0114_019_10_0303noon_0284_2_ex.jpg")
    10
    """
    fields = name.split("_")
    if len(fields) < 4 or any(whole_number(field) is None for field in fields[:3]):
        return None
    return whole_number(fields[2])


def _samples(
    folder: Path, images: str, subset: str, lines: list[Line], problems: list[Problem]
) -> tuple[Sample, ...]:
    present = _paths_below(folder / images)
    missing = [line.path for line in lines if line.path.lower() not in present]
    if missing:
        raise _missing_images(folder, images, subset, missing, len(lines))
    split = split_of(subset)
    names = [present[line.path.lower()] for line in lines]
    problems += wrong.upper_case_suffixes(folder / images, names)
    samples = []
    for line, name in zip(lines, names, strict=True):
        subject = subject_of("msmt17", split, line.pid)
        samples.append(Sample(str(folder / images / name), line.pid, line.camera - 1, subject))
    return tuple(sorted(samples, key=lambda s: s.path))


def _paths_below(folder: Path) -> dict[str, str]:
    """Return the paths of all images by their lower-case form; faster than a check per line."""
    return {
        f"{person.name}/{path.name}".lower(): f"{person.name}/{path.name}"
        for person in list_folders(folder)
        for path in person.iterdir()
        if is_image_name(path.name)
    }


def _missing_images(
    folder: Path, images: str, subset: str, missing: list[str], total: int
) -> DatasetError:
    text = (
        f"{len(missing)} of the {total} {subset} images listed in {folder} are not in {images}/ "
        f"({wrong.examples(missing)})"
    )
    if images.startswith("mask_"):
        return DatasetError(
            "v2-images-v1-lists",
            f"{text}: V2 images with V1 lists; copy the list_*.txt of the MSMT17_V2 archive next "
            "to mask_train_v2",
        )
    return DatasetError("images-missing", f"{text}; unpack the archive again")


def _load_market_style(folder: Path, request: LoadRequest) -> LoadedData:
    splits, problems = read_market_tree(folder, request.base_name)
    highest = max(s.camid + 1 for s in (*splits.train, *splits.query, *splits.gallery))
    if highest < _FIRST_TWO_DIGIT_CAMERA:
        text = (
            f"{folder} has no camera above {highest}, but MSMT17 has 15: this copy was made with "
            "one digit of the camera, so that camera 14 became 1 and true matches are removed; "
            "recreate it from MSMT17_V1 with data/train_split.py"
        )
        problems = (*problems, Problem("one-digit-camera", text))
    # A copy does not record its protocol, but the number of training images does.
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


def _explain_incomplete(root: Path) -> None:
    """Raise the error for images without lists, or for lists in another folder."""
    images = find_below(root, ROOTS, lambda f: _layout_of(f) is not None)
    lists = find_below(root, ROOTS, _has_lists)
    if images is None:
        return
    if _layout_of(images) == _LAYOUTS[0] and lists is not None:
        raise DatasetError(
            "v2-images-v1-lists",
            f"V2 images in {images} but lists only in {lists}: V2 images with V1 lists; copy the "
            f"four list_*.txt of the MSMT17_V2 archive into {images}",
        )
    raise DatasetError(
        "missing-list",
        f"{images} lacks {', '.join(LISTS)}; unpack the archive again, it contains them",
    )
