"""All data sets by name, and the functions that load one."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from data.datasets import csv_table, cuhk03, folder, market1501, msmt17
from data.datasets.layout import SUBSETS, Counts, LoadedData, Loader, LoadRequest
from data.datasets.market1501 import (
    load_validation_tree,
    read_validation_tree,
    train_split_command,
)
from data.problems import DatasetError, Problem, copy_problems, identity_problems
from data.records import DatasetSplits
from utils.files import existing_path, expanded
from utils.logger import get_logger

_LOGGER = get_logger()


def _load_synthetic(request: LoadRequest) -> LoadedData:
    """Draw the synthetic data set if it does not exist yet, and load it."""
    # Imported here because no other data set needs the code that draws people.
    from data.datasets.synthetic import ensure_synthetic

    tree = ensure_synthetic(request.root, **request.synthetic_options)
    return read_validation_tree(tree, request, "Synthetic")


# To add a data set, write a module with a loader and add one line here.
DATASETS: dict[str, Loader] = {
    "market1501": market1501.load,
    "market1501_val": market1501.load_validation,
    "msmt17": msmt17.load,
    "msmt17_val": partial(load_validation_tree, title=msmt17.TITLE),
    "cuhk03": cuhk03.load,
    "cuhk03_val": partial(load_validation_tree, title=cuhk03.TITLE),
    "synthetic": _load_synthetic,
}
# Your own data: the name is this word, a colon and a path.
OWN_DATA: dict[str, Loader] = {"folder": folder.load, "csv": csv_table.load}


def is_own_data(name: str) -> bool:
    """Return whether a name is ``folder:PATH`` or ``csv:FILE``."""
    kind, colon, path = name.partition(":")
    return bool(colon and path and kind in OWN_DATA)


def find_loader(name: str) -> Loader:
    """Return the loader of a name; raise a DatasetError with all names if it is unknown."""
    if is_own_data(name):
        return OWN_DATA[name.partition(":")[0]]
    if name in DATASETS:
        return DATASETS[name]
    choices = [*DATASETS, *(f"{kind}:PATH" for kind in OWN_DATA)]
    nearest = difflib.get_close_matches(name.lower(), choices, 1, 0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise DatasetError(
        "unknown-dataset", f"DATASETS.NAMES is {name!r}; expected one of {', '.join(choices)}{hint}"
    )


def load_data(request: LoadRequest, *, compare_images: bool = False) -> LoadedData:
    """Load a data set with its problems; nothing is logged.

    ``compare_images`` looks for images that are in two subsets, which reads every file.
    """
    loaded = find_loader(request.name)(request)
    problems = []
    for subset, expected in loaded.expected.items():
        counts = Counts.of(getattr(loaded.splits, subset))
        if counts.images and counts != expected:
            text = (
                f"{loaded.title} {subset}: found {counts}, expected {expected}; scores are not "
                "comparable with published scores; unpack the archive again"
            )
            problems.append(Problem("wrong-counts", text))
    if not loaded.splits.train:
        text = f"{loaded.title} has no training images: it can be evaluated, but not trained on"
        problems.append(Problem("no-training-images", text, "note"))
    if is_own_data(request.name):
        problems += identity_problems(loaded.splits)
    if compare_images:
        copies = copy_problems(loaded.splits)
        problems += copies
        if copies:  # reports of runs contain it
            texts = [problem.text.partition(" (for example")[0] for problem in copies]
            notes = loaded.splits.notes | {"copies": "; ".join(texts)}
            loaded = replace(loaded, splits=replace(loaded.splits, notes=notes))
    return loaded.with_problems(*problems)


def load_splits(
    name: str,
    root: str | Path,
    *,
    msmt17_protocol: str = "train",
    cuhk03_kind: str = "labeled",
    synthetic_options: Mapping[str, int] | None = None,
) -> DatasetSplits:
    """Load a data set; log its banner and its problems. Arguments are as in `LoadRequest`.

    Raises:
        DatasetError: The name is unknown, or the data cannot be used.
    """
    root = existing_path(expanded(root))
    request = LoadRequest(name, root, msmt17_protocol, cuhk03_kind, dict(synthetic_options or {}))
    loaded = load_data(request, compare_images=True)
    for line in banner(loaded):
        _LOGGER.info(line)
    for problem in loaded.problems:
        _LOGGER.log(logging.INFO if problem.level == "note" else logging.WARNING, problem.text)
    return loaded.splits


def banner(loaded: LoadedData) -> list[str]:
    """Return the table of counts, in the published format."""
    rule, head = "-" * 46, "subset       | # ids  | # images | # cameras"
    lines = [f"=> {loaded.title} loaded", rule, head, rule]
    for subset in SUBSETS:
        count = Counts.of(getattr(loaded.splits, subset))
        if count.images:
            lines.append(f"{subset:<12} | {count.ids:>6} | {count.images:>8} | {count.cameras:>9}")
    lines.append(rule)
    lines += [f"{key}: {value}" for key, value in loaded.splits.notes.items()]
    return lines


def split_command(request: LoadRequest) -> str:
    """Return how to get a validation split for a data set without one: its name and the command."""
    name = request.name
    split = f"{name}_val"
    if is_own_data(name):
        kind, _, path = name.partition(":")
        split = f"folder:{Path(path) if kind == 'folder' else Path(path).with_suffix('')}_val"
    return f"train on '{split}', which `{train_split_command(request)}` writes"
