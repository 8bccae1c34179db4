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
        degenerate: Features are NaN, infinite, zero, or the same for everybody: the scores say
            nothing, and are the worst that such features allow.
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
    query: Features,
    gallery: Features,
    *,
    cross_camera: bool = True,
    memory_mib: float | None = None,
) -> RetrievalScores:
    """Score queries in a gallery by cosine distance.

    Gallery images of the query's person and camera are ignored, junk (pid -1) is dropped, ties go
    to the earlier gallery image, and queries without a match are left out and counted. A short
    gallery pads the CMC curve with its last value.

    Args:
        query: Query set.
        gallery: Gallery; products are made in float32 on its device.
        cross_camera: False also counts images of the query's own camera, for single-camera sets.
        memory_mib: Most memory to use besides the features (MiB); None: what is free.

    Raises:
        UserError: No query has a valid match (it says which rule removed them), the feature
            sizes differ, or the gallery is too large for the memory.

    Example:
        >>> gallery = Features(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [7, 8], [1, 1])
        >>> scores = score_retrieval(Features(torch.tensor([[2.0, 1.0]]), [7], [0]), gallery)
        >>> scores.rank1, scores.mAP, scores.num_skipped
        (1.0, 1.0, 0)
    """
    names = ("query", "gallery")
    scores = score_directions(
        {names[0]: query}, {names[1]: gallery}, cross_camera=cross_camera, memory_mib=memory_mib
    )
    return scores[names]


def score_directions(
    queries: Mapping[str, Features],
    galleries: Mapping[str, Features],
    *,
    cross_camera: bool = True,
    memory_mib: float | None = None,
) -> dict[tuple[str, str], RetrievalScores]:
    """Score every query set in every gallery, e.g. raw and protected in raw and protected.

    The sets of one side show the same images. Rules and norms are worked out once, and each gallery
    is multiplied once, with all queries together.

    Returns:
        Scores by (query name, gallery name).

    Raises:
        UserError: As for ``score_retrieval``, or the sets of a side are not of the same images.
    """
    _check(queries, "query")
    _check(galleries, "gallery")
    sizes = {one.embeddings.shape[1] for side in (queries, galleries) for one in side.values()}
    if len(sizes) > 1:
        raise UserError(
            f"features have sizes {sorted(sizes)}; expected one size: take query and gallery from "
            "the same network"
        )
    query, gallery = next(iter(queries.values())), next(iter(galleries.values()))
    matching = Matching.of(query, gallery, cross_camera=cross_camera, memory_mib=memory_mib)
    with torch.inference_mode():
        unit = {name: UnitFeatures.of(one) for name, one in queries.items()}
        scores = {}
        for target, features in galleries.items():
            found = UnitFeatures.of(features)
            ranks = rank_matches(tuple(unit.values()), found, matching, memory_mib=memory_mib)
            for name, one in zip(queries, ranks, strict=True):
                scores[name, target] = scores_of_ranks(
                    one,
                    matching,
                    query,
                    degenerate=unit[name].degenerate or found.degenerate,
                    cross_camera=cross_camera,
                )
    return {(name, target): scores[name, target] for name in queries for target in galleries}


def scores_of_ranks(
    ranks: Indices,
    matching: Matching,
    query: Features,
    *,
    degenerate: bool,
    cross_camera: bool,
) -> RetrievalScores:
    """Turn the ranks of all matches into scores.

    Args:
        ranks: 1-based, laid out like ``matching.matches.values``, ascending within a query.
        matching: What each query had to find.
        query: The query set.
        degenerate: Passed on.
        cross_camera: Passed on.
    """
    starts, counts = matching.matches.offsets[:-1], matching.matches.lengths
    found = np.arange(len(ranks)) - np.repeat(starts, counts) + 1
    last = ranks[starts + counts - 1]
    per_query = QueryResults(
        index=matching.queries,
        pid=query.pids.cpu().numpy()[matching.queries],
        camid=query.camids.cpu().numpy()[matching.queries],
        num_matches=counts,
        first_rank=ranks[starts],
        last_rank=last,
        average_precision=np.add.reduceat(found / ranks, starts) / counts,
        inverse_negative_penalty=counts / last,
    )
    hits = np.bincount(np.minimum(per_query.first_rank, CMC_LENGTH + 1), minlength=CMC_LENGTH + 2)
    return RetrievalScores(
        cmc=np.cumsum(hits[1 : CMC_LENGTH + 1]) / len(per_query),
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


def _check(sets: Mapping[str, Features], side: str) -> None:
    if not sets:
        raise UserError(f"no {side} features were given; expected at least one set of them")
    (first_name, first), *others = sets.items()
    for name, one in others:
        if not (
            torch.equal(one.pids.cpu(), first.pids.cpu())
            and torch.equal(one.camids.cpu(), first.camids.cpu())
        ):
            raise UserError(
                f"{side} sets {first_name!r} and {name!r} differ in pids or cameras; expected the "
                "same images in the same order"
            )
