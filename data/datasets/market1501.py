"""Market-1501, and every other data set in its layout.

Market-1501 (v15.09.15) has 6 cameras, 1,501 identities and detected boxes. Copies of other data
sets, ``folder:PATH`` and the splits of ``data/train_split.py`` use its folders and file names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data import problems as wrong
from data.datasets.layout import (
    JUNK_PID,
    MARKET_PATTERN,
    Counts,
    LoadedData,
    LoadRequest,
    Origin,
    find_below,
    has_folders,
    images_below,
    list_folders,
    list_images,
    not_found,
    parse_market_name,
    split_of,
    subject_of,
)
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

FOLDERS = ("bounding_box_train", "bounding_box_test", "query")
TEST_FOLDERS = ("bounding_box_test", "query")  # enough for an evaluation
VALIDATION_FOLDERS = {
    "train": "bounding_box_train",
    "val_query": "bounding_box_val_query",
    "val_gallery": "bounding_box_val_gallery",
    "query": "query",
    "gallery": "bounding_box_test",
}
SPLIT_RECORD = "split.json"
# For data sets that exist in two forms: the field of a request and of split.json, and its key.
SETTINGS = {
    "msmt17": ("msmt17_protocol", "MSMT17.PROTOCOL"),
    "cuhk03": ("cuhk03_kind", "CUHK03.KIND"),
}

TITLE = "Market1501"
ROOTS = ("market1501", "Market-1501-v15.09.15", "Market-1501", "Market")
ORIGIN = Origin(
    TITLE, ROOTS, ", ".join(FOLDERS), "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html"
)
# Without junk. The identities of the gallery include pid 0, the distractors.
EXPECTED = {
    "train": Counts(751, 12_936, 6),
    "query": Counts(750, 3_368, 6),
    "gallery": Counts(751, 15_913, 6),
}


def load(request: LoadRequest) -> LoadedData:
    """Load ``market1501``: the whole training set, without a validation split.

    Raises:
        DatasetError: It was not found, or is not Market-1501.
    """
    root = request.root
    folder = find_below(root, ROOTS, lambda folder: has_folders(folder, TEST_FOLDERS))
    if folder is None:
        partial = find_below(root, ROOTS, _is_part)
        raise missing_folders(partial, TITLE) if partial else not_found(root, ORIGIN, _is_part)
    splits, problems = read_market_tree(folder, request.base_name)
    _check_gallery(folder, splits)
    distractors = folder / "images"
    if distractors.is_dir():
        text = (
            f"{distractors} (the 500k distractors, {len(list_images(distractors)):,} images) is "
            "not used: scores are those of the standard gallery"
        )
        problems = (*problems, Problem("distractors-unused", text, "note"))
    return LoadedData(splits, TITLE, "Market-1501", folder, EXPECTED, problems)


def load_validation(request: LoadRequest) -> LoadedData:
    """Load ``market1501_val``, which ``data/train_split.py`` writes."""
    loaded = load_validation_tree(request, TITLE)
    _check_gallery(loaded.folder, loaded.splits)
    return loaded


def _is_part(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in FOLDERS)


def _check_gallery(folder: Path, splits: DatasetSplits) -> None:
    """Raise an error if gt_bbox is in the place of the gallery.

    The names of hand-drawn boxes end in _00, those of detected boxes in _01 and higher. The queries
    are among the hand-drawn boxes, so every score would be far too good.
    """
    if all(Path(s.path).stem.split(".")[0].endswith("_00") for s in splits.gallery):
        raise DatasetError(
            "gt-bbox-as-gallery",
            f"{folder / 'bounding_box_test'} contains hand-drawn boxes instead of the gallery "
            "(every name ends in _00, as in gt_bbox); the gallery is bounding_box_test of the "
            "archive, 19,732 detected boxes",
        )


def read_folder(
    folder: Path, dataset: str, subset: str, first_camera: int = 1
) -> tuple[tuple[Sample, ...], list[Problem]]:
    """Return the samples of a folder of Market-style names, and its problems.

    Junk (pid -1) is dropped, distractors (pid 0) are kept. The number ``first_camera`` in names
    becomes camera 0, ``dataset`` the first field of the subjects.

    Raises:
        DatasetError: The folder is empty, or no name is Market-style.
    """
    paths = list_images(folder)
    if not paths:
        raise wrong.empty_folder(folder, subset)
    parsed = [(path, parse_market_name(path.name)) for path in paths]
    unread = [path.name for path, who in parsed if who is None]
    if len(unread) == len(paths):
        raise wrong.no_name_matches(folder, unread, MARKET_PATTERN)
    problems = []
    if unread:
        text = (
            f"{len(unread)} images in {folder} are left out because they are not named "
            f"{MARKET_PATTERN} ({wrong.examples(unread)}); rename or remove them"
        )
        problems.append(Problem("names-skipped", text))
    problems += wrong.upper_case_suffixes(folder, (path.name for path in paths))
    nested = [path for child in list_folders(folder) for path in images_below(child)]
    if nested:
        text = (
            f"{len(nested)} images in sub-folders of {folder} are not used (for example "
            f"{nested[0].relative_to(folder)}); move them away, or into {folder.name} itself"
        )
        problems.append(Problem("images-left-out", text))
    split = split_of(subset)
    samples = tuple(
        Sample(str(path), who.pid, who.camera - first_camera, subject_of(dataset, split, who.pid))
        for path, who in parsed
        if who is not None and who.pid != JUNK_PID
    )
    return samples, problems


def _read_folders(
    folder: Path, dataset: str, subsets: Iterable[str]
) -> tuple[dict[str, tuple[Sample, ...]], tuple[Problem, ...]]:
    """Return the samples of each subset, and the problems of all."""
    parts: dict[str, tuple[Sample, ...]] = {}
    problems: list[Problem] = []
    for subset in subsets:
        parts[subset], found = read_folder(folder / VALIDATION_FOLDERS[subset], dataset, subset)
        problems += found
    return parts, tuple(problems)


def read_market_tree(folder: Path, dataset: str) -> tuple[DatasetSplits, tuple[Problem, ...]]:
    """Read ``bounding_box_train`` (may be missing), ``query`` and ``bounding_box_test``."""
    train = folder / VALIDATION_FOLDERS["train"]
    subsets = ["query", "gallery"]
    if train.is_dir() and list_images(train):  # an evaluation needs no training images
        subsets.insert(0, "train")
    parts, problems = _read_folders(folder, dataset, subsets)
    return DatasetSplits(dataset, **parts, notes={}), problems


def missing_folders(folder: Path, title: str) -> DatasetError:
    """Return the error for a tree without some of the three folders."""
    lacking = [name for name in FOLDERS if not (folder / name).is_dir()]
    hint = "; gt_bbox and gt_query cannot replace them" if (folder / "gt_bbox").is_dir() else ""
    return DatasetError(
        "missing-folder",
        f"{title} in {folder} lacks {', '.join(lacking)} (expected {', '.join(FOLDERS)}){hint}; "
        "unpack the archive again",
    )


def load_validation_tree(request: LoadRequest, title: str) -> LoadedData:
    """Load the split that ``data/train_split.py`` wrote for a data set.

    Raises:
        DatasetError: The split was not found, or was made with another protocol or kind of box; the
            text contains the command that makes it.
    """
    folder = find_below(
        request.root, [request.name], lambda f: has_folders(f, list(VALIDATION_FOLDERS.values())), 0
    )
    if folder is None:
        raise _no_split(request)
    if request.base_name in SETTINGS:
        _check_setting(folder, request)
    return read_validation_tree(folder, request, title)


def read_validation_tree(folder: Path, request: LoadRequest, title: str) -> LoadedData:
    """Read the five folders of a tree with a validation split."""
    parts, problems = _read_folders(folder, request.base_name, VALIDATION_FOLDERS)
    notes, split_problems = recorded_split(folder, parts)
    splits = DatasetSplits(request.name, **parts, notes=notes)
    layout = "Market-style with validation"
    return LoadedData(splits, title, layout, folder, {}, (*problems, *split_problems))


def _no_split(request: LoadRequest) -> DatasetError:
    command = train_split_command(request)
    present = request.root / request.name
    if present.is_dir():
        lacking = [n for n in VALIDATION_FOLDERS.values() if not (present / n).is_dir()]
        text = f"{present} lacks {', '.join(lacking)}; recreate it with: {command} --overwrite"
    else:
        text = f"{request.name} is not in {request.root}; make the validation split with: {command}"
    return DatasetError("no-validation-split", text)


def train_split_command(request: LoadRequest) -> str:
    """Return the command that makes the validation split of a data set."""
    name = request.name if ":" in request.name else request.base_name
    command = (
        f"python3 data/train_split.py --dataset_root_dir '{request.root}' --dataset_name '{name}'"
    )
    field, _ = SETTINGS.get(name, ("", ""))
    return f"{command} --{field} '{getattr(request, field)}'" if field else command


def _check_setting(folder: Path, request: LoadRequest) -> None:
    """Raise an error if a split was made with another protocol or kind of box than requested.

    Records of earlier versions contain the value only in a note. A split without a record is
    accepted.
    """
    field, key = SETTINGS[request.base_name]
    record = _read_record(folder)
    note = record.get("notes", {}).get("protocol", "")
    noted = re.search(r"(?:trained on|new protocol,) (\w+)", note)
    used = record.get(field, noted and noted[1])
    wanted = getattr(request, field)
    if used and wanted and used != wanted:
        raise DatasetError(
            "split-setting",
            f"{folder} was made with {key} {used}, but {key} is {wanted}; set {key} {used}, or "
            f"recreate the split with: {train_split_command(request)} --overwrite",
        )


def tree_hash(names: Iterable[str]) -> str:
    """Return the SHA-256 over the sorted ``folder/name`` of a split, equal for every location."""
    text = "\n".join(sorted(names))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the content of ``split.json``; empty if the file does not exist.

    Raises:
        DatasetError: The record is damaged.
    """
    path = folder / SPLIT_RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        notes = {str(k): str(v) for k, v in record["notes"].items()}
        notes["split"] = f"{record['strategy']}, seed {record['seed']}, {record['hash'][:12]}"
        return {**record, "notes": notes}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            "bad-split-record",
            f"{path} is damaged ({error}); recreate the split with train_split.py --overwrite",
        ) from error


def recorded_split(
    folder: Path, parts: Mapping[str, tuple[Sample, ...]]
) -> tuple[dict[str, str], tuple[Problem, ...]]:
    """Return the notes of ``split.json``, and a warning if the images differ from the record.

    Raises:
        DatasetError: The record is damaged.
    """
    record = _read_record(folder)
    if not record:
        return {}, ()
    actual = tree_hash(
        f"{VALIDATION_FOLDERS[subset]}/{Path(s.path).name}"
        for subset, samples in parts.items()
        for s in samples
    )
    if actual == record["hash"]:
        return record["notes"], ()
    text = (
        f"the images in {folder} are not those of its split.json; recreate the split with "
        "train_split.py --overwrite"
    )
    return record["notes"], (Problem("split-changed", text),)
