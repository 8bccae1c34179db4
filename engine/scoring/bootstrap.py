"""How far a rate may be from its true value: 95 % intervals from resampled identities.

Queries of one person are not independent: a person who is hard to find is hard in every query. So
people are drawn with replacement, each with all queries, and not single queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.scoring.retrieval import CMC_LENGTH, RetrievalScores
from utils.errors import UserError

_SAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A rate between its bounds, all in [0, 1]."""

    value: float
    low: float
    high: float


def bootstrap_ratios(
    numerators: ArrayLike,
    denominators: ArrayLike,
    pids: ArrayLike,
    *,
    level: float = 0.95,
    samples: int = _SAMPLES,
    seed: int = 1,
) -> list[Interval]:
    """Return the interval of each of K rates, every one a sum divided by a sum.

    Args:
        numerators: What each query adds to the upper sum (Q, K).
        denominators: What it adds to the lower sum (Q,) or (Q, K), such as 1 for a mean.
        pids: Identity of each query (Q,).
        level: Share of resamples between the bounds.
        samples: Number of resamples.
        seed: Of the draw.

    Raises:
        UserError: There is no query, or ``level`` or ``samples`` is out of range.

    Example:
        >>> bootstrap_ratios([[1], [1], [1]], [1, 1, 1], [4, 4, 5])
        [Interval(value=1.0, low=1.0, high=1.0)]
    """
    if not 0 < level < 1 or samples < 1:
        raise UserError(
            f"a bootstrap got level {level} and {samples} samples; expected a level between 0 and "
            "1 and at least one sample"
        )
    upper = np.asarray(numerators, np.float64)
    if not len(upper):
        raise UserError("a bootstrap got no query; expected at least one")
    lower = np.asarray(denominators, np.float64)
    lower = np.broadcast_to(lower[:, None] if lower.ndim == 1 else lower, upper.shape)
    people, owner = np.unique(np.asarray(pids), return_inverse=True)
    sums = np.zeros((2, len(people), upper.shape[1]))
    np.add.at(sums[0], owner, upper)
    np.add.at(sums[1], owner, lower)
    times = draws(len(people), samples, seed)
    drawn, count = times @ sums[0], times @ sums[1]
    # A resample in which nothing could be counted says nothing.
    rates = np.divide(drawn, count, out=np.full_like(drawn, np.nan), where=count > 0)
    low, high = np.nanquantile(rates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    value = sums[0].sum(0) / sums[1].sum(0)
    return [Interval(*map(float, one)) for one in zip(value, low, high, strict=True)]


def draws(num_people: int, samples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each person is drawn in each resample (samples, people)."""
    rng = np.random.default_rng(seed)
    share = np.full(num_people, 1 / num_people)
    return rng.multinomial(num_people, share, size=samples).astype(np.float64)


def retrieval_intervals(
    scores: RetrievalScores, *, level: float = 0.95, samples: int = _SAMPLES, seed: int = 1
) -> dict[str, Interval]:
    """Return the intervals of rank1, rank5, rank10, mAP and mINP, and of the whole CMC curve.

    Args:
        scores: Scores with their per-query results.
        level: Share of resamples between the bounds.
        samples: Number of resamples.
        seed: Of the draw.

    Returns:
        Intervals by name; the curve's are ``rank1`` to ``rank50``.
    """
    queries = scores.per_query
    found = queries.first_rank[:, None] <= np.arange(1, CMC_LENGTH + 1)
    columns = [found, queries.average_precision[:, None], queries.inverse_negative_penalty[:, None]]
    names = [*(f"rank{rank}" for rank in range(1, CMC_LENGTH + 1)), "mAP", "mINP"]
    ones = np.ones(len(queries))
    intervals = bootstrap_ratios(
        np.hstack(columns), ones, queries.pid, level=level, samples=samples, seed=seed
    )
    return dict(zip(names, intervals, strict=True))
