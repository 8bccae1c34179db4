"""Folders of pictures named as in Market-1501, and the trees of ``data/train_split.py``.

Market-1501 (v15.09.15): 6 cameras, 1,501 identities, detected boxes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data import problems as wrong
from data.datasets.layout import (
    MARKET_PATTERN,
    Counts,
    LoadedData,
    LoadRequest,
    Origin,
    find_below,
    has_folders,
    list_images,
    not_found,
    parse_market_name,
    subject_of,
    upper_case_names,
)
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

FOLDERS = ("bounding_box_train", "bounding_box_test", "query")
VALIDATION_FOLDERS = {
    "train": "bounding_box_train",
    "val_query": "bounding_box_val_query",
    "val_gallery": "bounding_box_val_gallery",
    "query": "query",
    "gallery": "bounding_box_test",
}
JUNK_PID = -1


@dataclass(frozen=True)
class FolderContent:
    """Samples of one folder and what was wrong with it."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]


def split_of(subset: str) -> str:
    """Part of a subject's label: query and gallery share theirs, validation is part of training."""
    return "test" if subset in ("query", "gallery") else "train"


def read_folder(folder: Path, dataset: str, subset: str, first_camera: int = 1) -> FolderContent:
    """Read one folder of Market-style names; junk (pid -1) is dropped, distractors (pid 0) stay.

    Args:
        folder: Holds the pictures.
        dataset: First field of the subjects.
        subset: One of ``train``, ``val_query``, ``val_gallery``, ``query``, ``gallery``.
        first_camera: Number in the names that becomes camera 0.

    Raises:
        DatasetError: The folder is empty, or none of its names can be read.
    """
    paths = list_images(folder)
    if not paths:
        raise wrong.empty_folder(folder, subset)
    parsed = [(path, parse_market_name(path.name)) for path in paths]
    unread = [path.name for path, who in parsed if who is None]
    if len(unread) == len(paths):
        raise wrong.no_name_matches(folder, unread, MARKET_PATTERN)
    found = []
    if unread:
        found.append(wrong.some_names_do_not_match(folder, unread, MARKET_PATTERN))
    if shouting := upper_case_names(paths):
        found.append(wrong.upper_case_suffix(folder, shouting))
    split = split_of(subset)
    samples = tuple(
        Sample(str(path), who.pid, who.camera - first_camera, subject_of(dataset, split, who.pid))
        for path, who in parsed
        if who is not None and who.pid != JUNK_PID
    )
    return FolderContent(samples, tuple(found))


def read_market_tree(folder: Path, dataset: str) -> tuple[DatasetSplits, tuple[Problem, ...]]:
    """Read ``bounding_box_train``, ``query`` and ``bounding_box_test``."""
    parts = {
        subset: read_folder(folder / VALIDATION_FOLDERS[subset], dataset, subset)
        for subset in ("train", "query", "gallery")
    }
    splits = DatasetSplits(
        dataset,
        train=parts["train"].samples,
        query=parts["query"].samples,
        gallery=parts["gallery"].samples,
    )
    return splits, tuple(p for part in parts.values() for p in part.problems)


def missing_folders(folder: Path, title: str) -> DatasetError:
    """Name the folder that a tree lacks."""
    lacking = [name for name in FOLDERS if not (folder / name).is_dir()]
    hint = (
        "; gt_bbox and gt_query cannot stand in for them" if (folder / "gt_bbox").is_dir() else ""
    )
    return DatasetError(
        "missing-folder",
        f"{title} in {folder} lacks {', '.join(lacking)} (expected {', '.join(FOLDERS)}){hint}; "
        "unpack the archive again",
    )


def tree_hash(names: Iterable[str]) -> str:
    """SHA-256 over the sorted ``folder/name`` of a split, the same wherever the split lies."""
    text = "\n".join(sorted(names))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def load_validation_tree(request: LoadRequest, title: str) -> LoadedData:
    """Load what ``data/train_split.py`` wrote for a data set.

    Raises:
        DatasetError: There is no such tree; the text holds the command that makes it.
    """
    folder = find_below(
        request.root, [request.name], lambda f: has_folders(f, list(VALIDATION_FOLDERS.values())), 0
    )
    if folder is None:
        raise _no_split(request)
    return read_validation_tree(folder, request, title)


def read_validation_tree(folder: Path, request: LoadRequest, title: str) -> LoadedData:
    """Read the five folders of a tree with a validation split."""
    parts = {
        subset: read_folder(folder / name, request.base_name, subset)
        for subset, name in VALIDATION_FOLDERS.items()
    }
    notes, problems = _recorded_notes(folder, parts)
    splits = DatasetSplits(
        request.name,
        train=parts["train"].samples,
        query=parts["query"].samples,
        gallery=parts["gallery"].samples,
        val_query=parts["val_query"].samples,
        val_gallery=parts["val_gallery"].samples,
        notes=notes,
    )
    found = tuple(p for part in parts.values() for p in part.problems)
    return LoadedData(splits, title, "Market-style with validation", folder, {}, found + problems)


def _no_split(request: LoadRequest) -> DatasetError:
    command = (
        f"python3 data/train_split.py --dataset_root_dir '{request.root}' "
        f"--dataset_name '{request.base_name}'"
    )
    present = request.root / request.name
    if present.is_dir():
        lacking = [n for n in VALIDATION_FOLDERS.values() if not (present / n).is_dir()]
        text = f"{present} lacks {', '.join(lacking)}; make it anew with: {command} --overwrite"
    else:
        text = (
            f"{request.name} is not in {request.root}; make the validation split first: {command}"
        )
    return DatasetError("no-validation-split", text)


def _recorded_notes(
    folder: Path, parts: dict[str, FolderContent]
) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """Read the notes of ``split.json``, and see whether the tree is still the one it describes."""
    path = folder / "split.json"
    if not path.is_file():
        return {}, ()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        notes = {str(k): str(v) for k, v in record["notes"].items()}
        notes["split"] = f"{record['strategy']}, seed {record['seed']}, {record['hash'][:12]}"
        recorded = record["hash"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            "bad-split-record",
            f"{path} is damaged ({error}); make the split anew with train_split.py --overwrite",
        ) from error
    now = tree_hash(
        f"{VALIDATION_FOLDERS[subset]}/{Path(s.path).name}"
        for subset, part in parts.items()
        for s in part.samples
    )
    if now == recorded:
        return notes, ()
    text = (
        f"the pictures in {folder} are not those that split.json was written for; make the split "
        "anew with train_split.py --overwrite"
    )
    return notes, (Problem("split-changed", text),)


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
