"""Market-1501 (v15.09.15): 6 cameras, 1,501 identities, detected boxes."""

from __future__ import annotations

from pathlib import Path

from data import problems as wrong
from data.datasets.base import Counts, LoadedData, LoadRequest
from data.datasets.locate import Origin, find_below, has_folders, not_found
from data.datasets.market_style import (
    FOLDERS,
    load_validation_tree,
    missing_folders,
    read_market_tree,
)
from data.records import DatasetSplits

TITLE = "Market1501"
ROOTS = ("market1501", "Market-1501-v15.09.15", "Market-1501", "Market")
ORIGIN = Origin(
    TITLE,
    ROOTS,
    ", ".join(FOLDERS),
    "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html",
)
# After junk is dropped; the gallery's identities include pid 0, the distractors.
EXPECTED = {
    "train": Counts(751, 12_936, 6),
    "query": Counts(750, 3_368, 6),
    "gallery": Counts(751, 15_913, 6),
}


def load(request: LoadRequest) -> LoadedData:
    """Load ``market1501``: the whole training set, no validation.

    Raises:
        DatasetError: It is not there, or not what it should be.
    """
    folder = locate(request.root)
    splits, problems = read_market_tree(folder, request.base_name)
    _refuse_ground_truth(folder, splits)
    return LoadedData(splits, TITLE, "Market-1501", folder, EXPECTED, problems)


def load_validation(request: LoadRequest) -> LoadedData:
    """Load ``market1501_val``, made by ``data/train_split.py``."""
    loaded = load_validation_tree(request, TITLE)
    _refuse_ground_truth(loaded.folder, loaded.splits)
    return loaded


def locate(root: Path) -> Path:
    """Find the folder that holds ``bounding_box_train``, ``bounding_box_test`` and ``query``.

    Raises:
        DatasetError: It is not there; the text says what is there instead.
    """
    complete = find_below(root, ROOTS, lambda folder: has_folders(folder, FOLDERS))
    if complete is not None:
        return complete
    partial = find_below(root, ROOTS, _is_part)
    if partial is not None:
        raise missing_folders(partial, TITLE)
    raise not_found(root, ORIGIN, _is_part)


def _is_part(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in FOLDERS)


def _refuse_ground_truth(folder: Path, splits: DatasetSplits) -> None:
    """Refuse gt_bbox in place of the gallery.

    Hand-drawn boxes end in _00, detected ones count from 01. The queries themselves are
    among them, so every score would be far too good.
    """
    if all(Path(s.path).stem.split(".")[0].endswith("_00") for s in splits.gallery):
        raise wrong.ground_truth_as_gallery(folder / "bounding_box_test")
