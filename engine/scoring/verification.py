"""Same person or not: how often two images are rightly and wrongly taken for one person.

Pairs are query x gallery under the same rules as retrieval. They are never held: similarities go
into a histogram (``engine.scoring.bins``); every rate is exact for its threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.bins import BINS, bins_of, threshold_of
from engine.scoring.bootstrap import Interval, bootstrap_ratios
from engine.scoring.features import Features, UnitFeatures
from engine.scoring.matching import Matching
from engine.scoring.memory import MIB
from engine.scoring.person_pairs import PersonCounter, PersonPairs
from engine.scoring.products import product_chunks
from engine.scoring.ragged import Indices
from utils.errors import UserError

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
        UserError: As for ``score_retrieval``, or there is no pair of two people.
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
        raise UserError("every pair shows one person; expected at least two people in the gallery")
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
