"""Differences between evaluations of the same queries, with intervals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from engine.details import DETAILS_NAME
from engine.report import DIRECTIONS
from engine.scoring.intervals import (
    Access,
    Interval,
    access_warning,
    paired_differences,
    read_queries,
)
from utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """The change of one direction from an evaluation to the next one.

    Attributes:
        direction: Such as ``raw->protected``.
        before: Name of the first evaluation.
        after: Name of the second evaluation.
        intervals: Change of ``rank1`` and ``mAP`` with 95 % intervals over identities.
    """

    direction: str
    before: str
    after: str
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """Differences of evaluations on the same queries.

    Attributes:
        access: With which keys each evaluation read protected images, by name.
        warning: A sentence if these differ, else ''.
        differences: Of each evaluation from the one before it, direction by direction.
    """

    access: Mapping[str, Access]
    warning: str
    differences: Sequence[Difference]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Comparison:
        """Compare evaluations.

        Args:
            folders: Output folders of evaluations with EVAL.DETAILS on.

        Raises:
            UserError: A folder contains no per-query results, or the queries or rules differ.
        """
        _check_rules(folders)
        tables = {folder: read_queries(folder) for folder in folders}
        differences = []
        for query, gallery in DIRECTIONS:
            direction = f"{query}->{gallery}"
            for before, after in pairwise(folders):
                sides = [tables[folder].directions.get(direction, {}) for folder in (before, after)]
                change = paired_differences(*sides)
                differences.append(Difference(direction, _name(before), _name(after), change))
        return cls(
            {_name(folder): table.access for folder, table in tables.items()},
            access_warning({str(folder): table for folder, table in tables.items()}),
            differences,
        )

    def table(self) -> str:
        """Return the differences as text."""
        read = "; ".join(f"{name}: {access}" for name, access in self.access.items())
        lines = [f"protected images of {read}", *([self.warning] if self.warning else [])]
        head = "points on the same queries, 95 % over people"
        lines.append(f"{head:<46}{'rank-1':>24}{'mAP':>24}")
        for direction, group in groupby(self.differences, key=lambda each: each.direction):
            lines.append(f"  {direction}")
            for each in group:
                cells = "".join(f"{points(i):>24}" for i in each.intervals.values())
                lines.append(f"{f'    {each.after} - {each.before}':<46}{cells}")
        lines.append(
            "An interval that contains 0 shows no difference; more people or seeds may show one."
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the same for scripts, rates in [0, 1]."""
        return asdict(self)


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
