"""Verification: do two images show the same identity? Rates of a threshold on the cosine.

Pairs are query x gallery under the same rules as retrieval. There are too many to store, so their
cosines are counted in a histogram. Its bins are 2^-19 = 1.9e-6 wide, which is the rounding error of
float32 products of this length. Thresholds are lower edges of bins, and rates at them are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import Features, UnitFeatures
from engine.scoring.intervals import BOUNDS, Interval, bootstrap_ratios, draws
from engine.scoring.matching import Indices, Matching
from engine.scoring.ranking import product_chunks
from utils.errors import UserError
from utils.memory import MIB
from utils.seeding import numpy_generator

BINS = 2**20
FALSE_POSITIVE_RATES = (1e-1, 1e-2, 1e-3, 1e-4)
# Cosines are binned in blocks: intermediate values take five times the memory of the products.
_BLOCK_VALUES = 2**20
_VALUE_BYTES = 24
_HISTOGRAM_BYTES = 3 * 8 * BINS
# Pairs of each kind that intervals of the curve are computed from, and thresholds on it. Measured
# with 300 identities: a sample of 2^15 pairs widens the intervals by 18 %, of 2^17 by 10 %.
_BOOTSTRAP_PAIRS = 2**17
_BOOTSTRAP_THRESHOLDS = 2**12

Floats = NDArray[np.float64]


class NoImpostorPairs(UserError):  # noqa: N818 - the data may be valid for retrieval
    """No pair of a query and a gallery image shows different identities."""


@dataclass(frozen=True, eq=False)
class VerificationScores:
    """Histograms of the cosines of genuine pairs (same identity) and impostor pairs (two)."""

    genuine: Indices  # number of genuine pairs in each bin, int64 (BINS + 1,)
    impostor: Indices  # number of impostor pairs in each bin, int64 (BINS + 1,)
    pair_query: Indices  # scored query of each genuine pair
    pair_bin: Indices  # bin of each genuine pair
    # the same of a random sample of impostor pairs, with equally many for each query; all of them
    # in a small set
    impostor_query: Indices
    impostor_bin: Indices
    query_pid: Indices  # identity of each scored query
    degenerate: bool  # as in ``RetrievalScores``

    @property
    def num_genuine(self) -> int:
        """Number of genuine pairs."""
        return int(self.genuine.sum())

    @property
    def num_impostor(self) -> int:
        """Number of impostor pairs."""
        return int(self.impostor.sum())

    def bin_at(self, false_positive_rate: float) -> int:
        """Return the lowest bin at which at most this share of impostor pairs is accepted."""
        allowed = np.floor(false_positive_rate * self.num_impostor * (1 + 1e-12))
        accepted = np.cumsum(self.impostor[::-1])[::-1]
        return int(np.argmax(np.append(accepted, 0) <= allowed))

    def rates_at(self, first_bin: int) -> tuple[float, float]:
        """Return true and false positive rate of accepting all pairs from a bin on."""
        return (
            float(self.genuine[first_bin:].sum() / self.num_genuine),
            float(self.impostor[first_bin:].sum() / self.num_impostor),
        )

    def tpr_intervals(self, *, samples: int = 1000) -> dict[float, Interval]:
        """Return TPR with its interval at each of ``FALSE_POSITIVE_RATES``, thresholds fixed."""
        bins = np.array([self.bin_at(rate) for rate in FALSE_POSITIVE_RATES])
        accepted = np.zeros((len(self.query_pid), len(bins)))
        np.add.at(accepted, self.pair_query, self.pair_bin[:, None] >= bins)
        pairs = np.bincount(self.pair_query, minlength=len(self.query_pid))
        intervals = bootstrap_ratios(accepted, pairs, self.query_pid, samples=samples)
        return dict(zip(FALSE_POSITIVE_RATES, intervals, strict=True))

    def roc(self) -> tuple[Floats, Floats, Floats]:
        """Return false positive rate, true positive rate and threshold, from strict to lenient.

        The curve starts at (0, 0) and has a point for each bin with a pair.
        """
        used = np.flatnonzero((self.genuine > 0) | (self.impostor > 0))[::-1]
        false = np.cumsum(self.impostor[used]) / self.num_impostor
        true = np.cumsum(self.genuine[used]) / self.num_genuine
        threshold = np.concatenate([[np.inf], threshold_of(used)])
        return np.concatenate([[0.0], false]), np.concatenate([[0.0], true]), threshold

    def area_under_roc(self) -> float:
        """Return the probability that a genuine pair is closer than an impostor pair."""
        false, true, _ = self.roc()
        return area_and_equal_error(false, true)[0]

    def equal_error_rate(self) -> float:
        """Return the error rate at the threshold where both kinds of error are equal.

        If the curve crosses that line between two points, the mean of both error rates at the
        closer point.
        """
        false, true, _ = self.roc()
        return area_and_equal_error(false, true)[1]

    def curve_intervals(self, *, samples: int = 1000) -> dict[str, Interval]:
        """Return ``area_under_roc`` and ``equal_error_rate`` with intervals over identities.

        Each resample draws identities with replacement, with all genuine and impostor pairs of
        their queries, and computes both rates from the sorted cosines. At most 131,072 pairs of
        each kind take part. Bounds are shifted by the difference between the rates of these and
        of all pairs.
        """
        rng = numpy_generator(1, "bootstrap pairs")
        genuine, impostor = (
            rng.choice(count, min(count, _BOOTSTRAP_PAIRS), replace=False)
            for count in (len(self.pair_bin), len(self.impostor_bin))
        )
        bins = np.concatenate([self.pair_bin[genuine], self.impostor_bin[impostor]])
        query = np.concatenate([self.pair_query[genuine], self.impostor_query[impostor]])
        order = np.argsort(-bins)
        identities, identity_of = np.unique(self.query_pid, return_inverse=True)
        owner = identity_of[query[order]]
        is_genuine = order < len(genuine)
        ends = np.flatnonzero(np.diff(bins[order], append=-1))  # equal cosines share a threshold
        ends = ends[:: -(1 + len(ends) // _BOOTSTRAP_THRESHOLDS)][::-1]  # keeps the last one

        def rates(times: Floats) -> tuple[float, float]:
            weight = times[owner]
            true, false = (
                np.concatenate([[0.0], np.cumsum(weight * kind)[ends]])
                for kind in (is_genuine, ~is_genuine)
            )
            if not true[-1] or not false[-1]:
                return np.nan, np.nan  # this resample has no pair of one kind
            return area_and_equal_error(false / false[-1], true / true[-1])

        resampled = [rates(times) for times in draws(len(identities), samples, 1)]
        bounds = np.nanquantile(resampled, BOUNDS, axis=0)
        values = np.array([self.area_under_roc(), self.equal_error_rate()])
        low, high = np.clip(bounds + values - rates(np.ones(len(identities))), 0.0, 1.0)
        area, error = np.stack([values, low, high], 1).tolist()
        return {"area_under_roc": Interval(*area), "equal_error_rate": Interval(*error)}


def score_verification(
    query: Features, gallery: Features, *, cross_camera: bool = True
) -> VerificationScores:
    """Compare every query with every gallery image.

    Args:
        query: Query set.
        gallery: Gallery.
        cross_camera: Leave out genuine pairs from one camera.

    Raises:
        UserError: As for ``score_retrieval``, or there is no impostor pair.
    """
    matching = Matching.of(query, gallery, cross_camera=cross_camera)
    with torch.inference_mode():
        unit, target = UnitFeatures.of(query), UnitFeatures.of(gallery)
        device = target.embeddings.device
        query_broken = unit.broken.to(device)[torch.as_tensor(matching.queries, device=device)]
        impostor = torch.zeros(BINS + 2, dtype=torch.int64, device=device)
        pair_bin = np.empty(len(matching.matches.values), np.int64)
        columns = _sampled_columns(len(matching.queries), len(gallery))
        sampled = np.empty(columns.shape, np.int64)
        own_bytes = _HISTOGRAM_BYTES + _VALUE_BYTES * max(_BLOCK_VALUES, len(gallery))
        own_bytes += 2 * sampled.nbytes
        for chosen, (block,) in product_chunks(
            (unit,), target, matching, caller_mib=own_bytes / MIB
        ):
            rows = max(1, _BLOCK_VALUES // block.shape[1])
            for start in range(0, len(chosen), rows):
                queries = chosen[start : start + rows]
                bins = bins_of(block[start : start + rows] * target.inverse_norm)
                bins.masked_fill_(target.broken, 0)
                bins[query_broken[queries]] = 0
                genuine = _take_out_genuine(bins, matching, queries)
                pair_bin[matching.matches.positions(np.sort(queries))] = genuine
                impostor += torch.bincount(bins.reshape(-1), minlength=BINS + 2)
                picked = torch.as_tensor(columns[queries], device=device)
                sampled[queries] = bins.gather(1, picked).cpu().numpy()
    counted = impostor[: BINS + 1].cpu().numpy()
    if not counted.any():
        raise NoImpostorPairs(
            "every pair shows one identity; expected at least two identities in the gallery"
        )
    is_impostor = sampled <= BINS
    return VerificationScores(
        genuine=np.bincount(pair_bin, minlength=BINS + 1),
        impostor=counted,
        pair_query=np.repeat(np.arange(len(matching.queries)), matching.matches.lengths),
        pair_bin=pair_bin,
        impostor_query=is_impostor.nonzero()[0],
        impostor_bin=sampled[is_impostor],
        query_pid=query.pids.cpu().numpy()[matching.queries],
        degenerate=unit.degenerate or target.degenerate,
    )


def bins_of(similarity: Tensor) -> Tensor:
    """Return the bin of each cosine, int64, 0..BINS; NaN maps to bin 0, the largest distance."""
    scaled = (similarity.clamp(-1.0, 1.0) + 1.0) * (BINS / 2)
    return scaled.nan_to_num_(0.0).floor_().long()


def threshold_of(bins: int | Indices) -> NDArray[np.float64]:
    """Return the lowest cosine of a bin, float64.

    Example:
        >>> float(threshold_of(BINS)), float(threshold_of(0))
        (1.0, -1.0)
    """
    return np.asarray(bins, np.float64) / (BINS / 2) - 1.0


def area_and_equal_error(false: Floats, true: Floats) -> tuple[float, float]:
    """Return the area under a ROC curve, ascending from 0 to 1, and its equal error rate.

    The area is a sum of trapezoids, which counts ties between the two kinds half.

    Example:
        >>> area_and_equal_error(np.array([0, 0, 1.0]), np.array([0, 1.0, 1.0]))
        (1.0, 0.0)
    """
    area = float((np.diff(false) * (true[1:] + true[:-1]) / 2).sum())
    closest = int(np.argmin(np.abs(false - (1 - true))))
    return area, float((false[closest] + 1 - true[closest]) / 2)


@dataclass(frozen=True)
class Calibration:
    """A threshold for "same identity?", chosen on validation and used elsewhere unchanged."""

    threshold: float  # lowest cosine that is accepted as the same identity
    asked_fpr: float  # requested false positive rate
    fpr: float  # false positive rate on validation, at most ``asked_fpr``
    tpr: float  # true positive rate on validation
    num_genuine: int  # number of genuine pairs on validation
    num_impostor: int  # number of impostor pairs on validation


def calibrate(validation: VerificationScores, *, false_positive_rate: float = 1e-3) -> Calibration:
    """Choose the threshold with the most true positives at a false positive rate.

    It is chosen on the validation split: chosen on test data, it would make test rates meaningless.

    Raises:
        UserError: The features are degenerate, or there are too few pairs to measure such a rate.
    """
    if validation.degenerate:
        raise UserError(
            "no threshold can be chosen from features that are NaN, zero or the same for every "
            "identity; check the checkpoint"
        )
    # (1 / n) * n is less than 1 for some n.
    counted = false_positive_rate * validation.num_impostor * (1 + 1e-12)
    if not 0 < false_positive_rate < 1 or counted < 1:
        raise UserError(
            f"the false positive rate is {false_positive_rate:g} with {validation.num_impostor:,} "
            f"pairs of two identities; expected one between "
            f"{1 / max(1, validation.num_impostor):.1g} and 1, or a larger validation split"
        )
    first_bin = validation.bin_at(false_positive_rate)
    true, false = validation.rates_at(first_bin)
    return Calibration(
        float(threshold_of(first_bin)), false_positive_rate, false, true,
        validation.num_genuine, validation.num_impostor,
    )  # fmt: skip


def _sampled_columns(num_query: int, num_gallery: int) -> Indices:
    """Return random gallery positions for each query; in a small set all of them (Q, C)."""
    if num_query * num_gallery <= _BOOTSTRAP_PAIRS:
        return np.tile(np.arange(num_gallery), (num_query, 1))
    number = -(-_BOOTSTRAP_PAIRS // num_query)
    return numpy_generator(1, "impostor pairs").integers(num_gallery, size=(num_query, number))


def _take_out_genuine(bins: Tensor, matching: Matching, queries: Indices) -> Indices:
    """Return the bins of genuine pairs in query order; mark them and ignored pairs as BINS + 1."""
    bins.index_fill_(1, torch.as_tensor(matching.junk, device=bins.device), BINS + 1)
    row_of = np.argsort(queries, kind="stable")
    genuine = bins.new_zeros(0)
    for pairs in (matching.ignored, matching.matches):
        part = pairs.take(queries[row_of])
        rows = torch.as_tensor(np.repeat(row_of, part.lengths), device=bins.device)
        columns = torch.as_tensor(part.values, device=bins.device)
        genuine = bins[rows, columns]
        bins[rows, columns] = BINS + 1
    return np.asarray(genuine.cpu().numpy(), np.int64)
