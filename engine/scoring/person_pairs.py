"""Pairs of each query person, counted between some thresholds: what a drawn person brings along.

The area under the ROC curve and the equal error rate depend on pairs of one person and of two. A
resample of people therefore needs the curve of each person, and a histogram as fine as that of all
pairs together would take 8 MiB a person. So each is counted between at most 1,023 thresholds only,
which lie where the pairs are: at quantiles of a sample of both kinds. A resampled curve is exact at
these thresholds and taken as straight between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.bins import BINS, bins_of
from engine.scoring.bootstrap import Interval, draws
from engine.scoring.features import UnitFeatures
from engine.scoring.matching import Matching
from engine.scoring.precision import exact_float32
from engine.scoring.ragged import Indices
from utils.seeding import numpy_generator

_MOST_STEPS = 1024
_LEAST_STEPS = 16
_MOST_COUNTS = 2**22  # of all people together: 32 MiB
_SAMPLE = 1024
_RESAMPLES_AT_ONCE = 64

_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PersonPairs:
    """Counts of P query persons between K - 1 thresholds, from far to close.

    Attributes:
        genuine: Pairs of one person, int64 (P, K).
        impostor: Pairs of two people, int64 (P, K).
    """

    genuine: Indices
    impostor: Indices

    def intervals(
        self, area: float, equal_error: float, *, level: float, samples: int, seed: int
    ) -> tuple[Interval, Interval]:
        """Return area and equal error rate with intervals over people.

        What the thresholds between which was counted make of both is taken off again: the bounds
        are moved by as much as the given values differ from those of these counts.

        Args:
            area: Area under the curve of all thresholds.
            equal_error: Equal error rate on it.
            level: Share of resamples between the bounds.
            samples: Number of resamples.
            seed: Of the draw.
        """
        counts = [part.astype(np.float64) for part in (self.genuine, self.impostor)]
        times = draws(len(self.genuine), samples, seed)
        parts = np.array_split(times, -(-samples // _RESAMPLES_AT_ONCE))
        drawn = np.concatenate([_curves(part, *counts) for part in parts])
        bounds = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
        values = np.array([area, equal_error])
        own = _curves(np.ones((1, len(self.genuine))), *counts)[0]
        low, high = np.clip(bounds + (values - own), 0.0, 1.0)
        first, second = (Interval(*map(float, one)) for one in zip(values, low, high, strict=True))
        return first, second


def _curves(times: _Floats, genuine: _Floats, impostor: _Floats) -> _Floats:
    """Return area and equal error rate (R, 2) of people drawn so many times (R, P)."""
    true, false = _shares(times @ genuine), _shares(times @ impostor)
    area = (-np.diff(false) * (true[:, 1:] + true[:, :-1]) / 2).sum(1)
    # From 1, where everything is accepted, down to -1, where nothing is.
    gap = false - (1 - true)
    last = (gap >= 0).sum(1) - 1
    rows = np.arange(len(gap))
    above, below = gap[rows, last], gap[rows, last + 1]
    part = above / (above - below)
    equal = false[rows, last] + part * (false[rows, last + 1] - false[rows, last])
    return np.stack([area, equal], 1)


def _shares(counts: _Floats) -> _Floats:
    """Return the share of pairs (R, K + 1) that is accepted from each threshold on."""
    accepted = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
    # A resample without any such pair says nothing.
    total = np.where(accepted[:, :1] > 0, accepted[:, :1], np.nan)
    return np.hstack([accepted / total, np.zeros((len(counts), 1))])


class PersonCounter:
    """Counts pairs of two people for each query person, a block of queries at a time.

    Args:
        first: Queries.
        second: Gallery; counts are kept on its device.
        matching: Which queries are scored.
        pids: Identity of each scored query (Q,).
    """

    def __init__(
        self, first: UnitFeatures, second: UnitFeatures, matching: Matching, pids: Indices
    ) -> None:
        device = second.embeddings.device
        people, self._person = np.unique(pids, return_inverse=True)
        steps = max(_LEAST_STEPS, min(_MOST_STEPS, _MOST_COUNTS // len(people)))
        edges = _thresholds(first, second, matching, steps)
        self._step = np.searchsorted(edges, np.arange(BINS + 2), side="right").astype(np.int32)
        self._steps = len(edges) + 1
        self._step[-1] = self._steps  # of pairs that do not count
        self._step_on_device = torch.as_tensor(self._step, device=device)
        self._counts = torch.zeros(len(people), self._steps + 1, dtype=torch.int64, device=device)

    @property
    def num_bytes(self) -> int:
        """What the counts of both kinds, those of a block, and the table of steps take."""
        return 3 * self._counts.nbytes + 2 * self._step.nbytes

    def add(self, bins: Tensor, places: Indices) -> None:
        """Count the bins (R, G) of the pairs of some scored queries."""
        width = self._steps + 1
        people, row = np.unique(self._person[places], return_inverse=True)
        step = self._step_on_device[bins]
        step += torch.as_tensor((row * width).astype(np.int32), device=step.device)[:, None]
        counts = torch.bincount(step.reshape(-1), minlength=len(people) * width)
        self._counts[torch.as_tensor(people, device=step.device)] += counts.reshape(-1, width)

    def result(self, pair_query: Indices, pair_bin: Indices) -> PersonPairs:
        """Return the counts, with pairs of one person by query and bin."""
        steps, people = self._steps, len(self._counts)
        genuine = self._person[pair_query] * steps + self._step[pair_bin]
        return PersonPairs(
            np.bincount(genuine, minlength=people * steps).reshape(people, steps),
            self._counts[:, :steps].cpu().numpy(),
        )


def _thresholds(
    first: UnitFeatures, second: UnitFeatures, matching: Matching, steps: int
) -> Indices:
    """Return at most steps - 1 bins, ascending, half of them by each kind of pair."""
    matches = matching.matches
    chosen = np.linspace(0, len(matches.values) - 1, _SAMPLE).astype(np.int64)
    owner = np.searchsorted(matches.offsets, chosen, side="right") - 1
    # Nearly all pairs are of two people: those drawn need not be asked.
    rng = numpy_generator(1, "thresholds")
    drawn = rng.integers(len(matching.queries), size=_SAMPLE)
    seen = rng.integers(len(second.embeddings), size=_SAMPLE)
    shares = np.linspace(0, 1, (steps - 1) // 2)
    edges = [
        np.quantile(_bins(first, second, matching.queries[rows], columns), shares, method="lower")
        for rows, columns in ((owner, matches.values[chosen]), (drawn, seen))
    ]
    return np.unique(np.concatenate(edges))


def _bins(first: UnitFeatures, second: UnitFeatures, queries: Indices, gallery: Indices) -> Indices:
    """Return the bin of each of some pairs."""
    device = second.embeddings.device
    with exact_float32(device):
        left, right = (
            side.unit_rows(torch.as_tensor(index, device=side.embeddings.device)).to(device)
            for side, index in ((first, queries), (second, gallery))
        )
        bins = bins_of((left * right).sum(1))
    return np.asarray(bins.cpu().numpy(), np.int64)
