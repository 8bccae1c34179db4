"""CMC of a gallery with one image a person, averaged over draws of that image.

With many images a person the closest of them counts, which flatters. Here every draw leaves one
gallery image of each identity: the same for all queries, but of the query's own person one of the
images that count for the query. Distractors (pid 0) are one identity like the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.bootstrap import Interval, bootstrap_ratios
from engine.scoring.features import Features, UnitFeatures
from engine.scoring.matching import JUNK_PID, Indices, Matching
from engine.scoring.products import product_chunks
from engine.scoring.ranking import worst_rows
from engine.scoring.retrieval import CMC_LENGTH
from utils.memory import MIB

_SHOWN_BYTES = 32  # of one query and image shown: place, similarity, what is closer, and its sum
_BROKEN = float(np.finfo(np.float32).min)


@dataclass(frozen=True, eq=False)
class SingleShotScores:
    """Scores of galleries with one image a person.

    Attributes:
        cmc: Share of queries whose match is among the first k, mean over draws, float64 (50,).
        ranks: Rank of the match in each draw, from 1, int64 (Q, draws).
        query_pid: Identity of each scored query (Q,).
        num_identities: Images in a drawn gallery.
        degenerate: As in ``RetrievalScores``.
    """

    cmc: NDArray[np.float64]
    ranks: Indices
    query_pid: Indices
    num_identities: int
    degenerate: bool

    def intervals(
        self, *, level: float = 0.95, samples: int = 1000, seed: int = 1
    ) -> dict[str, Interval]:
        """Return rank1 to rank50 with their intervals over identities."""
        rates = (self.ranks[:, :, None] <= np.arange(1, CMC_LENGTH + 1)).mean(1)
        names = [f"rank{rank}" for rank in range(1, CMC_LENGTH + 1)]
        intervals = bootstrap_ratios(
            rates, np.ones(len(rates)), self.query_pid, level=level, samples=samples, seed=seed
        )
        return dict(zip(names, intervals, strict=True))


def score_single_shot(
    query: Features,
    gallery: Features,
    *,
    draws: int = 10,
    seed: int = 1,
    cross_camera: bool = True,
    memory_mib: float | None = None,
) -> SingleShotScores:
    """Score queries in galleries with one image a person.

    Args:
        query: Query set.
        gallery: Gallery from which images are drawn.
        draws: Number of drawn galleries.
        seed: Of the draws.
        cross_camera: Whether images of the query's own camera are ignored.
        memory_mib: Most memory to use besides the features (MiB); None: what is free.

    Raises:
        UserError: As for ``score_retrieval``.
    """
    matching = Matching.of(query, gallery, cross_camera=cross_camera, memory_mib=memory_mib)
    rng = np.random.default_rng(seed)
    gallery_pid = gallery.pids.cpu().numpy()
    query_pid = query.pids.cpu().numpy()[matching.queries]
    people, shots = _draw_galleries(gallery_pid, draws, rng)
    own = np.searchsorted(people, query_pid)
    match = _draw_matches(matching, draws, rng)
    ranks = np.empty((len(matching.queries), draws), np.int64)
    with torch.inference_mode():
        first, second = UnitFeatures.of(query), UnitFeatures.of(gallery)
        device = second.embeddings.device
        columns = torch.as_tensor(shots, device=device)
        for chosen, (block,) in product_chunks(
            (first,),
            second,
            matching,
            memory_mib=memory_mib,
            caller_mib=3 * shots.nbytes / MIB,
            caller_row_bytes=_SHOWN_BYTES * len(people),
        ):
            similarity = block.mul_(second.inverse_norm).masked_fill_(second.broken, _BROKEN)
            for draw in range(draws):
                places = (
                    torch.as_tensor(one, device=device)[:, None]
                    for one in (own[chosen], match[chosen, draw])
                )
                ranks[chosen, draw] = _ranks_shown(similarity, columns[draw], *places)
    ranks[worst_rows(first, second, matching)] = len(people)
    ranks[second.broken.cpu().numpy()[match]] = len(people)
    hits = np.bincount(np.minimum(ranks, CMC_LENGTH + 1).reshape(-1), minlength=CMC_LENGTH + 2)
    return SingleShotScores(
        cmc=np.cumsum(hits[1 : CMC_LENGTH + 1]) / ranks.size,
        ranks=ranks,
        query_pid=query_pid,
        num_identities=len(people),
        degenerate=first.degenerate or second.degenerate,
    )


def _ranks_shown(similarity: Tensor, columns: Tensor, own: Tensor, match: Tensor) -> Indices:
    """Return the rank of each query's match among the images of a draw (R,).

    Args:
        similarity: Of R queries and all gallery images (R, G).
        columns: The drawn image of each identity (I,).
        own: Which of the identities is the query's (R, 1).
        match: The image that takes its place (R, 1).
    """
    shown = columns.expand(len(similarity), -1).clone()
    shown.scatter_(1, own, match)
    values, value = similarity.gather(1, shown), similarity.gather(1, match)
    before = (values > value) | ((values == value) & (shown < match))
    return np.asarray(before.sum(1).cpu().numpy() + 1, np.int64)


def _draw_galleries(pids: Indices, draws: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Return the identities and one gallery position of each in every draw (draws, identities)."""
    order = np.argsort(pids, kind="stable")
    order = order[pids[order] != JUNK_PID]
    people, starts, counts = np.unique(pids[order], return_index=True, return_counts=True)
    chosen = starts + rng.integers(0, counts, (draws, len(people)))
    return people, order[chosen]


def _draw_matches(matching: Matching, draws: int, rng: np.random.Generator) -> Indices:
    """Return one match of each query in every draw (Q, draws)."""
    matches = matching.matches
    place = rng.integers(0, matches.lengths[:, None], (len(matches), draws))
    return matches.values[matches.offsets[:-1, None] + place]
