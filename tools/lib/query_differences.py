"""Differences between evaluations of the same queries, as a table with intervals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from engine.details import DETAILS_NAME
from engine.report import DIRECTIONS
from engine.scoring.bootstrap import Interval
from engine.scoring.paired import access_warning, paired_differences, read_queries
from utils.errors import UserError


def difference_table(folders: Sequence[Path]) -> str:
    """Return the differences of each evaluation from the one before it, for every direction.

    Args:
        folders: Output folders of evaluations with EVAL.DETAILS on.

    Raises:
        UserError: A folder contains no per-query results, or the queries or rules differ.
    """
    _check_rules(folders)
    tables = {folder: read_queries(folder) for folder in folders}
    read = "; ".join(f"{_name(folder)}: {table.access}" for folder, table in tables.items())
    lines = [f"protected images of {read}"]
    if warning := access_warning({str(folder): table for folder, table in tables.items()}):
        lines.append(warning)
    lines.append(f"{'points on the same queries, 95 % over people':<46}{'rank-1':>24}{'mAP':>24}")
    for query, gallery in DIRECTIONS:
        direction = f"{query}->{gallery}"
        lines.append(f"  {direction}")
        for before, after in pairwise(folders):
            sides = [tables[folder].directions.get(direction, {}) for folder in (before, after)]
            intervals = paired_differences(*sides)
            name = f"    {_name(after)} - {_name(before)}"
            lines.append(f"{name:<46}" + "".join(f"{points(i):>24}" for i in intervals.values()))
    lines.append(
        "An interval that contains 0 shows no difference; more people or seeds may show one."
    )
    return "\n".join(lines)


def _check_rules(folders: Sequence[Path]) -> None:
    """Raise if the evaluations counted matches by different rules."""
    rules: dict[bool, Path] = {}
    for folder in folders:
        path = folder / DETAILS_NAME
        if path.is_file():
            with contextlib.suppress(
                ValueError, LookupError, TypeError
            ):  # not written by this program
                rules.setdefault(
                    json.loads(path.read_text("utf-8"))["raw->raw"]["cross_camera"], folder
                )
    if len(rules) > 1:
        values = " and ".join(f"{folder} with {rule}" for rule, folder in sorted(rules.items()))
        raise UserError(f"TEST.CROSS_CAMERA differs: {values}; evaluate both with the same value")


def _name(folder: Path) -> str:
    return folder.name.removesuffix("-test")


def points(interval: Interval) -> str:
    """Return a difference of rates with its interval, in points: ``+12.0 [+8.8, +15.2]``."""
    value, low, high = (100 * bound for bound in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
