"""CMC with one gallery image for each identity, averaged over random galleries.

With several images of an identity in the gallery, the closest one counts, which raises the scores.
Here each drawn gallery contains one image of every identity. It is the same for all queries, except
that the query's identity is represented by one of the query's valid matches. Distractors (pid 0)
form one identity like the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import Features, UnitFeatures
from engine.scoring.intervals import Interval, bootstrap_ratios
from engine.scoring.matching import JUNK_PID, Indices, Matching
from engine.scoring.ranking import product_chunks, worst_rows
from engine.scoring.retrieval import CMC_LENGTH, cmc_of
from utils.memory import MIB

_CANDIDATE_BYTES = 32  # of one query and gallery image: position, similarity, comparison, its sum
_BROKEN = float(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class SingleShotScores:
    """Scores in galleries with one image for each identity."""

    # share of queries whose match is among the first k, mean over draws, float64 (50,)
    cmc: NDArray[np.float64]
    ranks: Indices  # rank of the match in each draw, from 1, int64 (Q, draws)
    query_pid: Indices  # identity of each scored query (Q,)
    num_identities: int  # images in a drawn gallery
    degenerate: bool  # as in ``RetrievalScores``

    def intervals(self, *, samples: int = 1000) -> dict[str, Interval]:
        """Return rank1 to rank50 with their intervals over identities."""
        rates = (self.ranks[:, :, None] <= np.arange(1, CMC_LENGTH + 1)).mean(1)
        names = [f"rank{rank}" for rank in range(1, CMC_LENGTH + 1)]
        intervals = bootstrap_ratios(rates, np.ones(len(rates)), self.query_pid, samples=samples)
        return dict(zip(names, intervals, strict=True))


def score_single_shot(
    query: Features, gallery: Features, *, draws: int = 10, seed: int = 1, cross_camera: bool = True
) -> SingleShotScores:
    """Score queries in random galleries with one image for each identity.

    Args:
        query: Query set.
        gallery: Gallery from which images are drawn.
        draws: Number of drawn galleries.
        seed: Seed of the draws.
        cross_camera: Ignore gallery images of the query's identity and camera.

    Raises:
        UserError: As for ``score_retrieval``.
    """
    matching = Matching.of(query, gallery, cross_camera=cross_camera)
    rng = np.random.default_rng(seed)
    gallery_pid = gallery.pids.cpu().numpy()
    query_pid = query.pids.cpu().numpy()[matching.queries]
    identities, drawn = _draw_galleries(gallery_pid, draws, rng)
    own = np.searchsorted(identities, query_pid)
    match = _draw_matches(matching, draws, rng)
    ranks = np.empty((len(matching.queries), draws), np.int64)
    with torch.inference_mode():
        unit, target = UnitFeatures.of(query), UnitFeatures.of(gallery)
        device = target.embeddings.device
        columns = torch.as_tensor(drawn, device=device)
        for chosen, (block,) in product_chunks(
            (unit,),
            target,
            matching,
            caller_mib=3 * drawn.nbytes / MIB,
            caller_row_bytes=_CANDIDATE_BYTES * len(identities),
        ):
            similarity = block.mul_(target.inverse_norm).masked_fill_(target.broken, _BROKEN)
            for draw in range(draws):
                positions = (
                    torch.as_tensor(index, device=device)[:, None]
                    for index in (own[chosen], match[chosen, draw])
                )
                ranks[chosen, draw] = _ranks_in_draw(similarity, columns[draw], *positions)
    ranks[worst_rows(unit, target, matching)] = len(identities)
    ranks[target.broken.cpu().numpy()[match]] = len(identities)
    return SingleShotScores(
        cmc=cmc_of(ranks),
        ranks=ranks,
        query_pid=query_pid,
        num_identities=len(identities),
        degenerate=unit.degenerate or target.degenerate,
    )


def _ranks_in_draw(similarity: Tensor, columns: Tensor, own: Tensor, match: Tensor) -> Indices:
    """Return the rank of each query's match in a drawn gallery (R,).

    ``columns`` (I,) are the drawn images. ``match`` (R, 1) represents the query's identity, whose
    position in ``columns`` is ``own`` (R, 1). Similarities are to all gallery images (R, G).
    """
    candidates = columns.expand(len(similarity), -1).clone()
    candidates.scatter_(1, own, match)
    values, value = similarity.gather(1, candidates), similarity.gather(1, match)
    before = (values > value) | ((values == value) & (candidates < match))
    return np.asarray(before.sum(1).cpu().numpy() + 1, np.int64)


def _draw_galleries(pids: Indices, draws: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Return the identities and one gallery position of each in every draw (draws, identities)."""
    order = np.argsort(pids, kind="stable")
    order = order[pids[order] != JUNK_PID]
    identities, starts, counts = np.unique(pids[order], return_index=True, return_counts=True)
    chosen = starts + rng.integers(0, counts, (draws, len(identities)))
    return identities, order[chosen]


def _draw_matches(matching: Matching, draws: int, rng: np.random.Generator) -> Indices:
    """Return one match of each query in every draw (Q, draws)."""
    matches = matching.matches
    number = rng.integers(0, matches.lengths[:, None], (len(matches), draws))
    return matches.values[matches.offsets[:-1, None] + number]
