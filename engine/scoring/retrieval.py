"""Retrieval scores: CMC, mAP and mINP from the ranks of the true matches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.scoring.features import Features, UnitFeatures
from engine.scoring.matching import Indices, Matching
from engine.scoring.ranking import rank_matches
from utils.errors import UserError

CMC_LENGTH = 50

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class QueryResults:
    """One entry for each of the Q scored queries."""

    index: Indices  # position in the query set (Q,)
    pid: Indices  # identity (Q,)
    camid: Indices  # camera (Q,)
    num_matches: Indices  # gallery images to find (Q,)
    first_rank: Indices  # rank of the closest match, from 1 (Q,)
    last_rank: Indices  # rank of the furthest match, from 1 (Q,)
    average_precision: Floats  # mean over matches of matches so far / rank (Q,)
    inverse_negative_penalty: Floats  # matches / rank of the furthest match (Q,)

    def __len__(self) -> int:
        """Return the number of scored queries."""
        return len(self.index)


@dataclass(frozen=True, eq=False)
class RetrievalScores:
    """Scores of one query set in one gallery; rates in [0, 1].

    Attributes:
        cmc: Share of queries with a match among the first k images, k = 1..50, float64 (50,).
        mAP: Mean average precision.
        mINP: Mean inverse negative penalty: matches / rank of the hardest match.
        num_queries: Queries that were scored.
        num_gallery: Gallery images without junk.
        num_skipped: Queries without a valid match, left out.
        skipped: The same by reason (``engine.scoring.matching.SKIP_REASONS``).
        degenerate: Features are NaN, infinite, zero, or the same for all identities: the scores
            mean nothing, and are the worst that such features allow.
        cross_camera: Whether images of the query's own camera were ignored.
        per_query: Results of each query.
    """

    cmc: Floats
    mAP: float  # noqa: N815 - the name in the literature
    mINP: float  # noqa: N815
    num_queries: int
    num_gallery: int
    num_skipped: int
    skipped: dict[str, int]
    degenerate: bool
    cross_camera: bool
    per_query: QueryResults

    @property
    def rank1(self) -> float:
        """Share of queries whose closest gallery image is a match."""
        return float(self.cmc[0])

    @property
    def rank5(self) -> float:
        """Share of queries with a match among the first 5."""
        return float(self.cmc[4])

    @property
    def rank10(self) -> float:
        """Share of queries with a match among the first 10."""
        return float(self.cmc[9])


def score_retrieval(
    query: Features, gallery: Features, *, cross_camera: bool = True
) -> RetrievalScores:
    """Score queries in a gallery by cosine distance.

    Gallery images of the query's identity and camera are ignored, junk (pid -1) is left out, ties
    go to the earlier gallery image, and queries without a match are left out and counted. A short
    gallery pads the CMC curve with its last value.

    Args:
        query: Query set.
        gallery: Gallery; products are computed in float32 on its device.
        cross_camera: False also counts images of the query's own camera, for single-camera sets.

    Raises:
        UserError: No query has a valid match (the message counts the reasons), the feature sizes
            differ, or the gallery is too large for the memory.

    Example:
        >>> gallery = Features(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [7, 8], [1, 1])
        >>> scores = score_retrieval(Features(torch.tensor([[2.0, 1.0]]), [7], [0]), gallery)
        >>> scores.rank1, scores.mAP, scores.num_skipped
        (1.0, 1.0, 0)
    """
    (scores,) = score_directions(
        {"query": query}, {"gallery": gallery}, cross_camera=cross_camera
    ).values()
    return scores


def score_directions(
    queries: Mapping[str, Features], galleries: Mapping[str, Features], *, cross_camera: bool = True
) -> dict[tuple[str, str], RetrievalScores]:
    """Score every query set in every gallery, e.g. raw and protected in raw and protected.

    The sets of one side show the same images. Matches and norms are computed once, and each gallery
    is multiplied once, with all queries together.

    Returns:
        Scores by (query name, gallery name).

    Raises:
        UserError: As for ``score_retrieval``, or the sets of a side are not of the same images.
    """
    query, gallery = _same_images(queries, "query"), _same_images(galleries, "gallery")
    sets = (*queries.values(), *galleries.values())
    sizes = {features.embeddings.shape[1] for features in sets}
    if len(sizes) > 1:
        raise UserError(
            f"features have sizes {sorted(sizes)}; expected one size: take query and gallery from "
            "the same network"
        )
    matching = Matching.of(query, gallery, cross_camera=cross_camera)
    scores = {}
    with torch.inference_mode():
        units = [UnitFeatures.of(features) for features in queries.values()]
        for target, features in galleries.items():
            unit = UnitFeatures.of(features)
            ranks = rank_matches(units, unit, matching)
            for name, query_unit, its_ranks in zip(queries, units, ranks, strict=True):
                scores[name, target] = scores_of_ranks(
                    its_ranks,
                    matching,
                    query,
                    degenerate=query_unit.degenerate or unit.degenerate,
                    cross_camera=cross_camera,
                )
    return {(name, target): scores[name, target] for name in queries for target in galleries}


def scores_of_ranks(
    ranks: Indices, matching: Matching, query: Features, *, degenerate: bool, cross_camera: bool
) -> RetrievalScores:
    """Return the scores of the ranks of all matches.

    Ranks begin at 1 and have the layout of ``matching.matches.values``, ascending within a query.
    """
    starts, counts = matching.matches.offsets[:-1], matching.matches.lengths
    matches_so_far = np.arange(len(ranks)) - np.repeat(starts, counts) + 1
    last = ranks[starts + counts - 1]
    per_query = QueryResults(
        index=matching.queries,
        pid=query.pids.cpu().numpy()[matching.queries],
        camid=query.camids.cpu().numpy()[matching.queries],
        num_matches=counts,
        first_rank=ranks[starts],
        last_rank=last,
        average_precision=np.add.reduceat(matches_so_far / ranks, starts) / counts,
        inverse_negative_penalty=counts / last,
    )
    return RetrievalScores(
        cmc=cmc_of(per_query.first_rank),
        mAP=float(per_query.average_precision.mean()),
        mINP=float(per_query.inverse_negative_penalty.mean()),
        num_queries=len(per_query),
        num_gallery=matching.num_gallery,
        num_skipped=sum(matching.skipped.values()),
        skipped=matching.skipped,
        degenerate=degenerate,
        cross_camera=cross_camera,
        per_query=per_query,
    )


def cmc_of(ranks: Indices) -> Floats:
    """Return the share of ranks of at most k, k = 1..50, float64 (50,)."""
    hits = np.bincount(np.minimum(ranks, CMC_LENGTH + 1).reshape(-1), minlength=CMC_LENGTH + 2)
    return np.cumsum(hits[1 : CMC_LENGTH + 1]) / ranks.size


def _same_images(sets: Mapping[str, Features], side: str) -> Features:
    """Return one of the sets, for identities and cameras; raise unless all have the same."""
    if not sets:
        raise UserError(f"no {side} features were given; expected at least one set of them")
    (first_name, first), *others = sets.items()
    for name, features in others:
        if not all(
            torch.equal(getattr(features, field).cpu(), getattr(first, field).cpu())
            for field in ("pids", "camids")
        ):
            raise UserError(
                f"{side} sets {first_name!r} and {name!r} differ in pids or cameras; expected the "
                "same images in the same order"
            )
    return first
