"""Bootstrap intervals of rates over identities.

Queries of one identity are not independent: a person who is hard to retrieve is hard in every
query. Resampling therefore draws identities with all their queries, not single queries.
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
    """A value and the bounds of its interval."""

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
    """Return K rates, each a ratio of two sums over queries, with intervals over identities.

    rate_k = sum_q numerators[q, k] / sum_q denominators[q, k]. A resample in which the denominator
    is 0 is left out.

    Args:
        numerators: Contribution of each query to the numerators (Q, K).
        denominators: Contribution to the denominators (Q,) or (Q, K), such as 1 for a mean.
        pids: Identity of each query (Q,).
        level: Share of resamples between the bounds.
        samples: Number of resamples.
        seed: Seed of the resampling.

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
    identities, owner = np.unique(np.asarray(pids), return_inverse=True)
    sums = np.zeros((2, len(identities), upper.shape[1]))
    np.add.at(sums[0], owner, upper)
    np.add.at(sums[1], owner, lower)
    times = draws(len(identities), samples, seed)
    drawn, count = times @ sums[0], times @ sums[1]
    rates = np.divide(drawn, count, out=np.full_like(drawn, np.nan), where=count > 0)
    low, high = np.nanquantile(rates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    value = sums[0].sum(0) / sums[1].sum(0)
    return [Interval(*map(float, bounds)) for bounds in zip(value, low, high, strict=True)]


def draws(num_identities: int, samples: int, seed: int) -> NDArray[np.float64]:
    """Return how often each resample draws each identity (samples, identities)."""
    rng = np.random.default_rng(seed)
    share = np.full(num_identities, 1 / num_identities)
    return rng.multinomial(num_identities, share, size=samples).astype(np.float64)


def retrieval_intervals(
    scores: RetrievalScores, *, level: float = 0.95, samples: int = _SAMPLES, seed: int = 1
) -> dict[str, Interval]:
    """Return the intervals of the CMC curve (``rank1`` to ``rank50``), ``mAP`` and ``mINP``.

    Args:
        scores: Scores with their per-query results.
        level: Share of resamples between the bounds.
        samples: Number of resamples.
        seed: Seed of the resampling.
    """
    queries = scores.per_query
    hits = queries.first_rank[:, None] <= np.arange(1, CMC_LENGTH + 1)
    columns = [hits, queries.average_precision[:, None], queries.inverse_negative_penalty[:, None]]
    names = [*(f"rank{rank}" for rank in range(1, CMC_LENGTH + 1)), "mAP", "mINP"]
    intervals = bootstrap_ratios(
        np.hstack(columns),
        np.ones(len(queries)),
        queries.pid,
        level=level,
        samples=samples,
        seed=seed,
    )
    return dict(zip(names, intervals, strict=True))
