"""Bootstrap intervals of rates over identities, and of differences on the same queries.

Queries of one identity are not independent: a person who is hard to retrieve is hard in every
query. Resampling therefore draws identities with all their queries, not single queries. Two rates
can differ significantly although their intervals overlap, because an identity that is hard for one
model is hard for the other. Differences of each query remove this common part.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.scoring.retrieval import CMC_LENGTH, RetrievalScores
from utils.errors import UserError

_SAMPLES = 1000
BOUNDS = ((1 - 0.95) / 2, (1 + 0.95) / 2)  # quantiles of a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its interval."""

    value: float
    low: float
    high: float


def bootstrap_ratios(
    numerators: ArrayLike,
    denominators: ArrayLike,
    pids: ArrayLike,
    *,
    samples: int = _SAMPLES,
    seed: int = 1,
) -> list[Interval]:
    """Return K rates, each a ratio of two sums over queries, with 95 % intervals over identities.

    rate_k = sum_q numerators[q, k] / sum_q denominators[q, k]. A resample in which the denominator
    is 0 is left out.

    Args:
        numerators: Contribution of each query to the numerators (Q, K).
        denominators: Contribution to the denominators (Q,) or (Q, K), such as 1 for a mean.
        pids: Identity of each query (Q,).
        samples: Number of resamples.
        seed: Seed of the resampling.

    Raises:
        UserError: There is no query.

    Example:
        >>> bootstrap_ratios([[1], [1], [1]], [1, 1, 1], [4, 4, 5])
        [Interval(value=1.0, low=1.0, high=1.0)]
    """
    upper = np.asarray(numerators, np.float64)
    if not len(upper):
        raise UserError("a bootstrap got no query; expected at least one")
    lower = np.asarray(denominators, np.float64)
    lower = np.broadcast_to(lower[:, None] if lower.ndim == 1 else lower, upper.shape)
    identities, owner = np.unique(np.asarray(pids), return_inverse=True)
    sums = np.zeros((2, len(identities), upper.shape[1]))
    np.add.at(sums[0], owner, upper)
    np.add.at(sums[1], owner, lower)
    times = draws(len(identities), samples, seed)
    drawn, count = times @ sums[0], times @ sums[1]
    rates = np.divide(drawn, count, out=np.full_like(drawn, np.nan), where=count > 0)
    low, high = np.nanquantile(rates, BOUNDS, axis=0)
    value = sums[0].sum(0) / sums[1].sum(0)
    return [Interval(*map(float, bounds)) for bounds in zip(value, low, high, strict=True)]


def draws(num_identities: int, samples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each resample draws each identity (samples, identities)."""
    rng = np.random.default_rng(seed)
    share = np.full(num_identities, 1 / num_identities)
    return rng.multinomial(num_identities, share, size=samples).astype(np.float64)


def retrieval_intervals(scores: RetrievalScores, *, samples: int = _SAMPLES) -> dict[str, Interval]:
    """Return the intervals of the CMC curve (``rank1`` to ``rank50``), ``mAP`` and ``mINP``."""
    queries = scores.per_query
    hits = queries.first_rank[:, None] <= np.arange(1, CMC_LENGTH + 1)
    columns = [hits, queries.average_precision[:, None], queries.inverse_negative_penalty[:, None]]
    names = [*(f"rank{rank}" for rank in range(1, CMC_LENGTH + 1)), "mAP", "mINP"]
    intervals = bootstrap_ratios(
        np.hstack(columns), np.ones(len(queries)), queries.pid, samples=samples
    )
    return dict(zip(names, intervals, strict=True))


PER_QUERY_NAME = "per_query.csv"
_REMEDY = "evaluate both with EVAL.DETAILS on, on the same data set and split"


@dataclass(frozen=True)
class QueryResult:
    """The scores of one query."""

    pid: int  # identity of the query
    # 1 if the closest image shows that identity, else 0; of several trainings, the mean
    rank1: float
    average_precision: float  # AP in [0, 1]


@dataclass(frozen=True)
class Access:
    """How protected images were opened before the re-ID network."""

    # key state, as in ``results.json``: ``none`` (not encrypted), ``right`` or ``ciphertext``
    key: str = "none"
    scheme: str = "none"  # name of the cipher; ``none`` if they were not encrypted

    def of(self, direction: str) -> Access:
        """Return the access of a direction; without protected images it is ``Access()``."""
        return self if "protected" in direction else Access()

    def __str__(self) -> str:
        return f"key {self.key}" + f", scheme {self.scheme}" * (self.scheme != "none")


@dataclass(frozen=True)
class QueryTable:
    """The scores of each query in one evaluation, or their mean over several."""

    access: Access  # how protected images were opened
    # results by direction (``raw->protected``) and path of the query
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
                raise UserError(
                    f"{path} was written by an earlier version without key states; evaluate again "
                    "with EVAL.DETAILS on (for a demo or a reproduced table: delete "
                    f"{path.parent} and run the same command)"
                )
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


def access_warning(tables: Mapping[str, QueryTable]) -> str:
    """Return a warning if evaluations opened protected images in different ways, else ''.

    Images that were not encrypted and images opened with the right key count as equal.
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
        if any(
            table.directions.get(way, {}).keys() != first.directions.get(way, {}).keys()
            for way in table.directions | first.directions
        ):
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


def paired_differences(
    first: Mapping[str, QueryResult], second: Mapping[str, QueryResult], *, seed: int = 1
) -> dict[str, Interval]:
    """Return second minus first in ``rank1`` and ``mAP``, with 95 % intervals over identities.

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
    before, after = (
        np.array([(side[path].rank1, side[path].average_precision) for path in paths])
        for side in (first, second)
    )
    pids = [first[path].pid for path in paths]
    rank1, mean_ap = bootstrap_ratios(after - before, np.ones(len(paths)), pids, seed=seed)
    return {"rank1": rank1, "mAP": mean_ap}
