"""Bins of similarity, so fine that a rate counted in them is exact for its threshold.

They are 2^-19 = 1.9e-6 wide, as fine as float32 products of this length are exact. Thresholds are
lower edges of bins.

Pairs of each query person, counted between some thresholds: what a drawn person brings along.

The area under the ROC curve and the equal error rate depend on pairs of one person and of two. A
resample of people therefore needs the curve of each person, and a histogram as fine as that of all
pairs together would take 8 MiB a person. So each is counted between at most 1,023 thresholds only,
which lie where the pairs are: at quantiles of a sample of both kinds. A resampled curve is exact at
these thresholds and taken as straight between them.

Same person or not: how often two images are rightly and wrongly taken for one person.

Pairs are query x gallery under the same rules as retrieval. They are never held: similarities go
into a histogram (``engine.scoring.verification``); every rate is exact for its threshold.

A threshold for "same person?", chosen on validation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.bootstrap import Interval, bootstrap_ratios, draws
from engine.scoring.features import Features, UnitFeatures
from engine.scoring.matching import Indices, Matching
from engine.scoring.products import product_chunks
from utils.errors import UserError
from utils.memory import MIB
from utils.precision import exact_float32
from utils.seeding import numpy_generator

BINS = 2**20


def bins_of(similarity: Tensor) -> Tensor:
    """Return the bin of each cosine, int64, 0..BINS; what is no number is as far as can be."""
    scaled = (similarity.clamp(-1.0, 1.0) + 1.0) * (BINS / 2)
    return scaled.nan_to_num_(0.0).floor_().long()


def threshold_of(bins: int | Indices) -> NDArray[np.float64]:
    """Return the lowest cosine of a bin, float64."""
    return np.asarray(bins, np.float64) / (BINS / 2) - 1.0


_MOST_STEPS = 1024
_LEAST_STEPS = 16
_MOST_COUNTS = 2**22  # of all people together: 32 MiB
_SAMPLE = 1024
_RESAMPLES_AT_ONCE = 64

_Floats = NDArray[np.float64]


class NoImpostorPairs(UserError):  # noqa: N818 - the data may be valid for retrieval
    """No pair of a query and a gallery image shows different identities."""


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


FALSE_POSITIVE_RATES = (1e-1, 1e-2, 1e-3, 1e-4)
# Values are turned into bins in blocks: with what lies between they take five times the memory of
# the products. Besides, three histograms.
_BLOCK_VALUES = 2**20
_VALUE_BYTES = 24
_HISTOGRAM_BYTES = 3 * 8 * BINS

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class VerificationScores:
    """How well a threshold on the cosine tells pairs of one person from pairs of two.

    Attributes:
        genuine: Number of pairs of one person in each bin of similarity, int64 (BINS + 1,).
        impostor: The same for two people.
        pair_query: For each genuine pair which scored query it belongs to.
        pair_bin: And its bin.
        query_pid: Identity of each scored query.
        by_person: The same pairs of each query person, more coarsely.
        degenerate: As in ``RetrievalScores``.
    """

    genuine: Indices
    impostor: Indices
    pair_query: Indices
    pair_bin: Indices
    query_pid: Indices
    by_person: PersonPairs
    degenerate: bool

    @property
    def num_genuine(self) -> int:
        """Number of pairs of one person."""
        return int(self.genuine.sum())

    @property
    def num_impostor(self) -> int:
        """Number of pairs of two people."""
        return int(self.impostor.sum())

    def bin_at(self, false_positive_rate: float) -> int:
        """Return the lowest bin from which on at most this share of impostors is accepted."""
        allowed = np.floor(false_positive_rate * self.num_impostor * (1 + 1e-12))
        accepted = np.cumsum(self.impostor[::-1])[::-1]
        return int(np.argmax(np.append(accepted, 0) <= allowed))

    def rates_at(self, first_bin: int) -> tuple[float, float]:
        """Return true and false positive rate of accepting all pairs from a bin on."""
        return (
            float(self.genuine[first_bin:].sum() / self.num_genuine),
            float(self.impostor[first_bin:].sum() / self.num_impostor),
        )

    def tpr_at(self, false_positive_rate: float) -> float:
        """Return the best true positive rate at no more than this false positive rate."""
        return self.rates_at(self.bin_at(false_positive_rate))[0]

    def tpr_intervals(
        self, *, level: float = 0.95, samples: int = 1000, seed: int = 1
    ) -> dict[float, Interval]:
        """Return TPR with its interval at each of ``FALSE_POSITIVE_RATES``, thresholds fixed."""
        bins = np.array([self.bin_at(rate) for rate in FALSE_POSITIVE_RATES])
        accepted = np.zeros((len(self.query_pid), len(bins)))
        np.add.at(accepted, self.pair_query, self.pair_bin[:, None] >= bins)
        pairs = np.bincount(self.pair_query, minlength=len(self.query_pid))
        intervals = bootstrap_ratios(
            accepted, pairs, self.query_pid, level=level, samples=samples, seed=seed
        )
        return dict(zip(FALSE_POSITIVE_RATES, intervals, strict=True))

    def roc(self) -> tuple[Floats, Floats, Floats]:
        """Return false positive rate, true positive rate and threshold, from strict to lenient.

        There is a point for each bin that holds a pair, after (0, 0).
        """
        used = np.flatnonzero((self.genuine > 0) | (self.impostor > 0))[::-1]
        false = np.cumsum(self.impostor[used]) / self.num_impostor
        true = np.cumsum(self.genuine[used]) / self.num_genuine
        threshold = np.concatenate([[np.inf], threshold_of(used)])
        return np.concatenate([[0.0], false]), np.concatenate([[0.0], true]), threshold

    def area_under_roc(self) -> float:
        """Return the chance that a pair of one person is closer than a pair of two."""
        false, true, _ = self.roc()
        return float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())

    def equal_error_rate(self) -> float:
        """Return the error where both kinds are equal; their mean where they cross in a step."""
        false, true, _ = self.roc()
        place = int(np.argmin(np.abs(false - (1 - true))))
        return float((false[place] + 1 - true[place]) / 2)

    def curve_intervals(
        self, *, level: float = 0.95, samples: int = 1000, seed: int = 1
    ) -> dict[str, Interval]:
        """Return ``area_under_roc`` and ``equal_error_rate`` with their intervals.

        A person is drawn with all pairs of his queries, also those with other people: thresholds
        and both rates move.
        """
        area, equal_error = self.by_person.intervals(
            self.area_under_roc(), self.equal_error_rate(), level=level, samples=samples, seed=seed
        )
        return {"area_under_roc": area, "equal_error_rate": equal_error}


def score_verification(
    query: Features,
    gallery: Features,
    *,
    cross_camera: bool = True,
    memory_mib: float | None = None,
) -> VerificationScores:
    """Compare every query with every gallery image.

    Args:
        query: Query set.
        gallery: Gallery.
        cross_camera: Whether pairs of one person under one camera are left out.
        memory_mib: Most memory to use besides the features (MiB); None: what is free.

    Raises:
        UserError: As for ``score_retrieval``.
        NoImpostorPairs: There is no pair of two people.
    """
    matching = Matching.of(query, gallery, cross_camera=cross_camera, memory_mib=memory_mib)
    with torch.inference_mode():
        first, second = UnitFeatures.of(query), UnitFeatures.of(gallery)
        device = second.embeddings.device
        first_broken = first.broken.to(device)[torch.as_tensor(matching.queries, device=device)]
        impostor = torch.zeros(BINS + 2, dtype=torch.int64, device=device)
        pair_bin = np.empty(len(matching.matches.values), np.int64)
        owner = np.repeat(np.arange(len(matching.queries)), matching.matches.lengths)
        pids = query.pids.cpu().numpy()[matching.queries]
        by_person = PersonCounter(first, second, matching, pids)
        own_bytes = _HISTOGRAM_BYTES + _VALUE_BYTES * max(_BLOCK_VALUES, len(gallery))
        own_bytes += by_person.num_bytes
        for chosen, (block,) in product_chunks(
            (first,), second, matching, memory_mib=memory_mib, caller_mib=own_bytes / MIB
        ):
            rows = max(1, _BLOCK_VALUES // block.shape[1])
            for at in range(0, len(chosen), rows):
                places = chosen[at : at + rows]
                bins = bins_of(block[at : at + rows] * second.inverse_norm)
                bins.masked_fill_(second.broken, 0)
                bins[first_broken[places]] = 0
                found = _set_aside(bins, matching, places)
                impostor += torch.bincount(bins.reshape(-1), minlength=BINS + 2)
                by_person.add(bins, places)
                pair_bin[matching.matches.places(np.sort(places))] = found
    counted = impostor[: BINS + 1].cpu().numpy()
    if not counted.any():
        raise NoImpostorPairs(
            "every pair shows one person; expected at least two people in the gallery"
        )
    return VerificationScores(
        genuine=np.bincount(pair_bin, minlength=BINS + 1),
        impostor=counted,
        pair_query=owner,
        pair_bin=pair_bin,
        query_pid=pids,
        by_person=by_person.result(owner, pair_bin),
        degenerate=first.degenerate or second.degenerate,
    )


def _set_aside(bins: Tensor, matching: Matching, places: Indices) -> Indices:
    """Take the bins of genuine pairs out, in query order, and hide those of ignored pairs."""
    bins.index_fill_(1, torch.as_tensor(matching.junk, device=bins.device), BINS + 1)
    row_of = np.argsort(places, kind="stable")
    for ragged, keep in ((matching.ignored, False), (matching.matches, True)):
        part = ragged.take(places[row_of])
        rows = torch.as_tensor(np.repeat(row_of, part.lengths), device=bins.device)
        columns = torch.as_tensor(part.values, device=bins.device)
        found = bins[rows, columns] if keep else rows[:0]
        bins[rows, columns] = BINS + 1
    return np.asarray(found.cpu().numpy(), np.int64)


@dataclass(frozen=True)
class Calibration:
    """A threshold for "same person?", chosen on validation and to be used elsewhere unchanged.

    Attributes:
        threshold: Lowest cosine that is taken for one person.
        asked_fpr: False positive rate that was asked for.
        fpr: False positive rate on validation, at most that.
        tpr: True positive rate on validation.
        num_genuine: Pairs of one person it was measured on.
        num_impostor: Pairs of two people.
    """

    threshold: float
    asked_fpr: float
    fpr: float
    tpr: float
    num_genuine: int
    num_impostor: int

    def same_person(self, similarity: float) -> bool:
        """Decide for one cosine."""
        return similarity >= self.threshold


def calibrate(validation: VerificationScores, *, false_positive_rate: float = 1e-3) -> Calibration:
    """Choose the threshold that accepts as many true pairs as a false positive rate allows.

    Args:
        validation: Scores of the validation split: a threshold chosen on test data says nothing.
        false_positive_rate: Share of pairs of two people that may be taken for one.

    Raises:
        UserError: The features are degenerate, or there are too few pairs to see such a rate.
    """
    if validation.degenerate:
        raise UserError(
            "no threshold can be chosen from features that are NaN, zero or the same for "
            "everybody; check the checkpoint"
        )
    if not 0 < false_positive_rate < 1 or false_positive_rate * validation.num_impostor < 1:
        raise UserError(
            f"the false positive rate is {false_positive_rate:g} with {validation.num_impostor:,} "
            f"pairs of two people; expected one between {1 / max(1, validation.num_impostor):.1g} "
            "and 1, or a larger validation split"
        )
    first_bin = validation.bin_at(false_positive_rate)
    true, false = validation.rates_at(first_bin)
    return Calibration(
        float(threshold_of(first_bin)),
        false_positive_rate,
        false,
        true,
        validation.num_genuine,
        validation.num_impostor,
    )


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the cosine of two embeddings (D,), as ``Calibration.same_person`` takes it."""
    pair = torch.stack([first.detach().float().cpu(), second.detach().float().cpu()])
    return float(torch.nn.functional.cosine_similarity(pair[:1], pair[1:]))
