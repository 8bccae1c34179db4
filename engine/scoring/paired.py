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


@dataclass(frozen=True)
class Access:
    """How protected images were read before the re-ID network saw them.

    Attributes:
        key: Key state, as in ``results.json``: ``none`` (they were not encrypted), ``right`` or
            ``ciphertext``.
        scheme: The cipher; ``none`` where they were not encrypted.
    """

    key: str = "none"
    scheme: str = "none"

    def of(self, direction: str) -> Access:
        """Return what it means for a direction: one without protected images needs no key."""
        return self if "protected" in direction else Access()

    def __str__(self) -> str:
        return f"key {self.key}" + f", scheme {self.scheme}" * (self.scheme != "none")


@dataclass(frozen=True)
class QueryTable:
    """What each query reached in one evaluation, or on the mean of several.

    Attributes:
        access: How its protected images were read.
        directions: Results by direction (``raw->protected``) and path of the query.
    """

    access: Access
    directions: dict[str, dict[str, QueryResult]]


def read_queries(folder: Path) -> QueryTable:
    """Read the per-query results that an evaluation left in its OUTPUT_DIR.

    Raises:
        UserError: There are none, or the file is no such table.
    """
    path = folder / PER_QUERY_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_REMEDY}")
    found: dict[str, dict[str, QueryResult]] = {}
    read: set[Access] = set()
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            rows = csv.DictReader(file)
            if "direction" in (names := rows.fieldnames or ()) and "key" not in names:
                raise _earlier(path)
            for row in rows:
                if "protected" in row["direction"]:
                    read.add(Access(row["key"], row["scheme"]))
                found.setdefault(row["direction"], {})[row["path"]] = QueryResult(
                    int(row["pid"]),
                    float(row["first_rank"] == "1"),
                    float(row["average_precision"]),
                )
            (access,) = read or {Access()}
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(
                f"{path} is not a table of per-query results ({error!r}); {_REMEDY}"
            ) from error
    return QueryTable(access, found)


def _earlier(path: Path) -> UserError:
    return UserError(
        f"{path} is of an earlier version and does not say with which key protected images were "
        f"read; evaluate again with EVAL.DETAILS on (of a demo or a reproduced table: delete "
        f"{path.parent} and give the same command)"
    )


def unlike(tables: Mapping[str, QueryTable]) -> str:
    """Say in a sentence that evaluations read protected images in different ways; '' if not.

    An image that never was encrypted and one that the right key opened are both as its holder sees
    them.

    Args:
        tables: Evaluations by what they are called.
    """
    accesses = {table.access for table in tables.values()}
    encrypted = accesses - {Access()}
    hidden = any(access.key == "ciphertext" for access in encrypted)
    if len(encrypted) < 2 and not (hidden and encrypted < accesses):
        return ""
    told = "; ".join(f"{name}: {table.access}" for name, table in tables.items())
    return (
        f"Protected images were not read alike ({told}): where they take part, differences are of "
        "that too, and not of the models alone."
    )


def mean_of(tables: Sequence[QueryTable]) -> QueryTable:
    """Return the mean over several trainings of what each query reached.

    Raises:
        UserError: The queries are not the same, or were read in different ways.
    """
    first = tables[0]
    for table in tables[1:]:
        if table.access != first.access:
            raise UserError(
                f"trainings were tested with {first.access} and with {table.access}; evaluate all "
                "with the same TEST.RETRIEVE_WITH_KEY and ISED.SCHEME"
            )
        if _queries(table) != _queries(first):
            raise UserError(f"trainings were tested with different queries; {_REMEDY}")
    directions = {
        way: {
            path: QueryResult(
                result.pid,
                fmean(table.directions[way][path].rank1 for table in tables),
                fmean(table.directions[way][path].average_precision for table in tables),
            )
            for path, result in found.items()
        }
        for way, found in first.directions.items()
    }
    return QueryTable(first.access, directions)


def _queries(table: QueryTable) -> dict[str, set[str]]:
    return {direction: set(found) for direction, found in table.directions.items()}


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
