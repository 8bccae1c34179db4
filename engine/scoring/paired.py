"""Is one model better than another, or were its queries lucky? Differences on the same queries.

Two rates whose intervals overlap may still differ clearly: hard people are hard for both models.
Taking the difference query by query removes what the two have in common.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from engine.scoring.bootstrap import Interval, bootstrap_ratios
from utils.errors import UserError

PER_QUERY_NAME = "per_query.csv"
_REMEDY = "evaluate both with EVAL.DETAILS on, on the same data set and split"


@dataclass(frozen=True)
class QueryResult:
    """What one query reached.

    Attributes:
        pid: Its person.
        rank1: 1 where the closest image shows that person, else 0; a share over trainings.
        average_precision: Its AP, in [0, 1].
    """

    pid: int
    rank1: float
    average_precision: float


# Results by direction (``raw->protected``) and path of the query.
QueryTable = dict[str, dict[str, QueryResult]]


def read_queries(folder: Path) -> QueryTable:
    """Read the per-query results that an evaluation left in its OUTPUT_DIR.

    Raises:
        UserError: There are none, or the file is no such table.
    """
    path = folder / PER_QUERY_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_REMEDY}")
    table: QueryTable = {}
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            for row in csv.DictReader(file):
                table.setdefault(row["direction"], {})[row["path"]] = QueryResult(
                    int(row["pid"]),
                    float(row["first_rank"] == "1"),
                    float(row["average_precision"]),
                )
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(
                f"{path} is not a table of per-query results ({error!r}); {_REMEDY}"
            ) from error
    return table


def mean_of(tables: Sequence[QueryTable]) -> QueryTable:
    """Return the mean over several trainings of what each query reached.

    Raises:
        UserError: The queries are not the same.
    """
    first = tables[0]
    for table in tables[1:]:
        if _queries(table) != _queries(first):
            raise UserError(f"trainings were tested with different queries; {_REMEDY}")
    return {
        way: {
            path: QueryResult(
                result.pid,
                fmean(table[way][path].rank1 for table in tables),
                fmean(table[way][path].average_precision for table in tables),
            )
            for path, result in found.items()
        }
        for way, found in first.items()
    }


def _queries(table: QueryTable) -> dict[str, set[str]]:
    return {direction: set(found) for direction, found in table.items()}


def differences(
    first: Mapping[str, QueryResult], second: Mapping[str, QueryResult], *, seed: int = 1
) -> dict[str, Interval]:
    """Return second minus first in ``rank1`` and ``mAP``, with 95 % intervals over persons.

    Args:
        first: Results of one direction by path.
        second: The same queries by another model.
        seed: Of the resampling.

    Raises:
        UserError: The queries are not the same.
    """
    if set(first) != set(second) or not first:
        alone = sorted(set(first) ^ set(second))
        example = f", {alone[0]} in one alone" if alone else ""
        raise UserError(
            f"{len(first)} queries are compared with {len(second)} others{example}; {_REMEDY}"
        )
    paths = sorted(first)
    change = np.array(
        [
            (
                second[path].rank1 - first[path].rank1,
                second[path].average_precision - first[path].average_precision,
            )
            for path in paths
        ]
    )
    pids = [first[path].pid for path in paths]
    rank1, mean_ap = bootstrap_ratios(change, np.ones(len(paths)), pids, seed=seed)
    return {"rank1": rank1, "mAP": mean_ap}
