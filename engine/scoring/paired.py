"""Paired differences: two evaluations compared on the same queries.

Two rates can differ significantly although their intervals overlap, because an identity that is
hard for one model is hard for the other. Differences of each query remove this common part.
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
    """The scores of one query.

    Attributes:
        pid: Identity of the query.
        rank1: 1 if the closest image shows that identity, else 0; of several trainings, the mean.
        average_precision: AP in [0, 1].
    """

    pid: int
    rank1: float
    average_precision: float


@dataclass(frozen=True)
class Access:
    """How protected images were opened before the re-ID network.

    Attributes:
        key: Key state, as in ``results.json``: ``none`` (not encrypted), ``right`` or
            ``ciphertext``.
        scheme: Name of the cipher; ``none`` if they were not encrypted.
    """

    key: str = "none"
    scheme: str = "none"

    def of(self, direction: str) -> Access:
        """Return the access of a direction; without protected images it is ``Access()``."""
        return self if "protected" in direction else Access()

    def __str__(self) -> str:
        return f"key {self.key}" + f", scheme {self.scheme}" * (self.scheme != "none")


@dataclass(frozen=True)
class QueryTable:
    """The scores of each query in one evaluation, or their mean over several.

    Attributes:
        access: How protected images were opened.
        directions: Results by direction (``raw->protected``) and path of the query.
    """

    access: Access
    directions: dict[str, dict[str, QueryResult]]


def read_queries(folder: Path) -> QueryTable:
    """Read the per-query results in the output folder of an evaluation.

    Raises:
        UserError: The file is missing or is not such a table.
    """
    path = folder / PER_QUERY_NAME
    if not path.is_file():
        raise UserError(f"the per-query results {path} do not exist; {_REMEDY}")
    directions: dict[str, dict[str, QueryResult]] = {}
    accesses: set[Access] = set()
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            rows = csv.DictReader(file)
            if "direction" in (names := rows.fieldnames or ()) and "key" not in names:
                raise _earlier_version(path)
            for row in rows:
                if "protected" in row["direction"]:
                    accesses.add(Access(row["key"], row["scheme"]))
                directions.setdefault(row["direction"], {})[row["path"]] = QueryResult(
                    int(row["pid"]),
                    float(row["first_rank"] == "1"),
                    float(row["average_precision"]),
                )
            (access,) = accesses or {Access()}
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(
                f"{path} is not a table of per-query results ({error!r}); {_REMEDY}"
            ) from error
    return QueryTable(access, directions)


def _earlier_version(path: Path) -> UserError:
    return UserError(
        f"{path} was written by an earlier version without key states; evaluate again with "
        f"EVAL.DETAILS on (for a demo or a reproduced table: delete {path.parent} and run the same "
        "command)"
    )


def access_warning(tables: Mapping[str, QueryTable]) -> str:
    """Return a warning if evaluations opened protected images in different ways, else ''.

    Images that were not encrypted and images opened with the right key count as equal.

    Args:
        tables: Evaluations by name.
    """
    accesses = {table.access for table in tables.values()}
    encrypted = accesses - {Access()}
    hidden = any(access.key == "ciphertext" for access in encrypted)
    if len(encrypted) < 2 and not (hidden and encrypted < accesses):
        return ""
    listed = "; ".join(f"{name}: {table.access}" for name, table in tables.items())
    return (
        f"Protected images were opened in different ways ({listed}): differences in directions "
        "with protected images are not due to the models alone."
    )


def mean_of(tables: Sequence[QueryTable]) -> QueryTable:
    """Return the mean of each query's scores over several trainings.

    Raises:
        UserError: The queries differ, or protected images were opened in different ways.
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
            for path, result in queries.items()
        }
        for way, queries in first.directions.items()
    }
    return QueryTable(first.access, directions)


def _queries(table: QueryTable) -> dict[str, set[str]]:
    return {direction: set(queries) for direction, queries in table.directions.items()}


def paired_differences(
    first: Mapping[str, QueryResult], second: Mapping[str, QueryResult], *, seed: int = 1
) -> dict[str, Interval]:
    """Return second minus first in ``rank1`` and ``mAP``, with 95 % intervals over identities.

    Args:
        first: Results of one direction by path.
        second: Results of the same queries by another model.
        seed: Seed of the bootstrap.

    Raises:
        UserError: The queries differ.
    """
    if set(first) != set(second) or not first:
        alone = sorted(set(first) ^ set(second))
        example = f", {alone[0]} is in one only" if alone else ""
        raise UserError(
            f"{len(first)} queries cannot be compared with {len(second)}{example}; {_REMEDY}"
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
