"""Every data set by name, and the one function that loads any of them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path

from data.datasets import csv_table, cuhk03, folder, market1501, msmt17
from data.datasets.layout import SUBSETS, Counts, LoadedData, Loader, LoadRequest
from data.datasets.market1501 import read_validation_tree
from data.problems import DatasetError, wrong_counts
from data.records import DatasetSplits
from utils.logger import get_logger

_LOGGER = get_logger()


def load_synthetic(request: LoadRequest) -> LoadedData:
    """Draw the embedded data set where it is not there yet, and load it."""
    # Imported here: drawing people is code that no other data set needs.
    from data.datasets.synthetic import ensure_synthetic

    tree = ensure_synthetic(request.root, **request.synthetic_options)
    return read_validation_tree(tree, request, "Synthetic")


# A data set is added with one file and one line.
DATASETS: dict[str, Loader] = {
    "market1501": market1501.load,
    "market1501_val": market1501.load_validation,
    "msmt17": msmt17.load,
    "msmt17_val": msmt17.load_validation,
    "cuhk03": cuhk03.load,
    "cuhk03_val": cuhk03.load_validation,
    "synthetic": load_synthetic,
}
# One's own data: the name is this word, a colon and a path.
OWN_DATA: dict[str, Loader] = {
    "folder": folder.load,
    "csv": csv_table.load,
}


def find_loader(name: str) -> Loader:
    """Look a data set up.

    Raises:
        DatasetError: There is none of that name; the text lists the choices and the nearest.
    """
    kind, colon, path = name.partition(":")
    if colon and path and kind in OWN_DATA:
        return OWN_DATA[kind]
    if name in DATASETS:
        return DATASETS[name]
    choices = [*DATASETS, *(f"{kind}:PATH" for kind in OWN_DATA)]
    nearest = difflib.get_close_matches(name.lower(), choices, 1, 0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise DatasetError(
        "unknown-dataset", f"DATASETS.NAMES is {name!r}; expected one of {', '.join(choices)}{hint}"
    )


def load_data(request: LoadRequest) -> LoadedData:
    """Load a data set with all that was found out about it, and without a word in the log."""
    loaded = find_loader(request.name)(request)
    return loaded.with_problems(
        *(
            wrong_counts(loaded.title, subset, str(found), str(expected))
            for subset, expected in loaded.expected.items()
            if (found := Counts.of(getattr(loaded.splits, subset))) != expected
        )
    )


def load_splits(
    name: str,
    root: str | Path,
    *,
    msmt17_protocol: str = "train",
    cuhk03_kind: str = "labeled",
    synthetic_options: Mapping[str, int] | None = None,
) -> DatasetSplits:
    """Load a data set, print its banner and warn of what is wrong with it.

    Args:
        name: A key of ``DATASETS``, ``folder:PATH`` or ``csv:FILE``.
        root: Folder that holds the data sets (DATASETS.ROOT_DIR).
        msmt17_protocol: ``train`` or ``trainval``.
        cuhk03_kind: ``labeled`` or ``detected``.
        synthetic_options: ``identities``, ``cameras``, ``images`` and ``seed`` of ``synthetic``.

    Raises:
        DatasetError: Unknown name, or the data cannot be used as it lies there.
    """
    request = LoadRequest(
        name, Path(root).expanduser(), msmt17_protocol, cuhk03_kind, dict(synthetic_options or {})
    )
    loaded = load_data(request)
    for line in banner(loaded):
        _LOGGER.info(line)
    for problem in loaded.problems:
        _LOGGER.log(logging.INFO if problem.level == "note" else logging.WARNING, problem.text)
    return loaded.splits


def banner(loaded: LoadedData) -> list[str]:
    """Table of what was loaded, as people's scripts look for it."""
    rule = "-" * 46
    lines = [
        f"=> {loaded.title} loaded",
        rule,
        "subset       | # ids  | # images | # cameras",
        rule,
    ]
    for subset in SUBSETS:
        samples = getattr(loaded.splits, subset)
        if samples:
            counts = Counts.of(samples)
            lines.append(
                f"{subset:<12} | {counts.ids:>6} | {counts.images:>8} | {counts.cameras:>9}"
            )
    lines.append(rule)
    lines += [f"{key}: {value}" for key, value in loaded.splits.notes.items()]
    return lines
