"""The sparse half of k-reciprocal re-ranking: who vouches for whom, and how much.

Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.

k-reciprocal re-ranking that keeps only the near neighbours of each image.

Definition (shared with the published evaluations): d = 2 (1 - cosine) over query and gallery
together, each row divided by its largest value; k1 + 1 neighbours including the image itself; a
reciprocal set grows by the reciprocal sets (round(k1 / 2)) of those members that overlap it by
more than two thirds; weights exp(-d), normalised, then averaged over the first k2 neighbours;
Jaccard distance from sums of minima; the result is (1 - lambda) Jaccard + lambda d.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import Features, UnitFeatures
from engine.scoring.matching import JUNK_PID, Indices, Matching, offsets_of, spans
from engine.scoring.neighbors import TILE, Images, Neighbors, nearest_neighbors, pair_similarities
from engine.scoring.products import query_chunks
from engine.scoring.ranking import RankCollector, worst_rows
from engine.scoring.retrieval import RetrievalScores, scores_of_ranks
from utils.errors import UserError
from utils.logger import get_logger
from utils.memory import (
    MIB,
    WORTH_TELLING,
    memory_budget_mib,
    require_memory,
    tell_memory,
)
from utils.precision import exact_float32
from utils.progress import Progress

_ROWS = 512
_NOBODY = -1

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SparseRows:
    """N sparse rows, one after the other.

    Attributes:
        columns: Columns of the entries, ascending within a row.
        values: Entries, float32.
        offsets: Where each row starts, and the end (N + 1,).
    """

    columns: Indices
    values: Floats
    offsets: Indices

    def row(self, index: int) -> tuple[Indices, Floats]:
        """Return columns and values of one row."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.columns[part], self.values[part]

    @property
    def lengths(self) -> Indices:
        """Number of entries of each row (N,)."""
        return np.diff(self.offsets)

    def transposed(self, first_row: int, num_columns: int) -> SparseRows:
        """Return the rows from ``first_row`` on as columns, renumbered from 0."""
        start = self.offsets[first_row]
        columns, values = self.columns[start:], self.values[start:]
        owner = np.repeat(np.arange(len(self.offsets) - 1 - first_row), self.lengths[first_row:])
        order = np.argsort(columns, kind="stable")
        counts = np.bincount(columns, minlength=num_columns)
        return SparseRows(owner[order], values[order], offsets_of(counts))


def reciprocal_weights(
    images: Images, neighbors: Neighbors, *, k1: int, scale: Floats
) -> SparseRows:
    """Return each image's weights over the images that are reciprocally close to it.

    Args:
        images: For the similarities of pairs that are no near neighbours.
        neighbors: At least k1 + 1 of each image, itself included.
        k1: Neighbours that can be reciprocal.
        scale: Largest distance of each image (N,).

    Returns:
        exp(-distance / scale) over the expanded reciprocal set, normalised to 1 (N rows).
    """
    ranked = neighbors.index[:, : k1 + 1]
    core = _reciprocal(ranked)
    half = _reciprocal(ranked[:, : round(k1 / 2) + 1])
    parts = [_expand(core[start : start + _ROWS], half) for start in range(0, len(core), _ROWS)]
    lengths = np.concatenate([(part != _NOBODY).sum(1) for part in parts])
    members = np.concatenate([part[part != _NOBODY] for part in parts])
    owner = np.repeat(np.arange(len(core)), lengths)
    similarity = _similarities(images, neighbors, owner, members)
    weights = np.exp(-2.0 * (1.0 - similarity) / scale[owner])
    sums = np.bincount(owner, weights, minlength=len(core))
    weights = (weights / sums[owner]).astype(np.float32)
    return SparseRows(members, weights, offsets_of(lengths))


def _reciprocal(ranked: Indices) -> Indices:
    """Return the neighbours that have the image among theirs, the others as -1 (N, k)."""
    result = np.full_like(ranked, _NOBODY)
    for start in range(0, len(ranked), _ROWS):
        mine = ranked[start : start + _ROWS]
        number = np.arange(start, start + len(mine))
        mutual = (ranked[mine] == number[:, None, None]).any(2)
        result[start : start + _ROWS] = np.where(mutual, mine, _NOBODY)
    return result


def _expand(core: Indices, half: Indices) -> Indices:
    """Grow the sets of some images, ascending, with -1 for nobody (R, any)."""
    theirs = half[core]
    theirs[core == _NOBODY] = _NOBODY
    exists = theirs != _NOBODY
    # Two "nobody" are equal too: only those who exist count.
    shared = (theirs[:, :, :, None] == core[:, None, None, :]).any(3) & exists
    joins = 3 * shared.sum(2) > 2 * exists.sum(2)
    theirs[~joins] = _NOBODY
    members = np.sort(np.concatenate([core, theirs.reshape(len(core), -1)], 1), axis=1)
    members[:, 1:][members[:, 1:] == members[:, :-1]] = _NOBODY
    return members


def _similarities(images: Images, neighbors: Neighbors, owner: Indices, members: Indices) -> Floats:
    """Look up the cosine of each pair among the neighbours, and compute the few others."""
    count, keep = neighbors.index.shape
    known = (np.arange(count)[:, None] * count + neighbors.index).reshape(-1)
    order = np.argsort(known)
    known, values = known[order], neighbors.similarity.reshape(-1)[order]
    result = np.empty(len(owner), np.float32)
    missing = np.ones(len(owner), np.bool_)
    for first, second in ((owner, members), (members, owner)):
        wanted = first * count + second
        place = np.minimum(np.searchsorted(known, wanted), count * keep - 1)
        found = missing & (known[place] == wanted)
        result[found] = values[place[found]]
        missing &= ~found
    result[missing] = pair_similarities(images, owner[missing], members[missing])
    return result


def averaged(weights: SparseRows, neighbors: Indices) -> SparseRows:
    """Return each row's mean over the rows of its first neighbours.

    Args:
        weights: N rows.
        neighbors: The neighbours to average over, itself included (N, k2).
    """
    count, number = neighbors.shape
    parts = [_average(weights, neighbors[at : at + _ROWS]) for at in range(0, count, _ROWS)]
    columns, values, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
    return SparseRows(columns, values / np.float32(number), offsets_of(lengths))


def _average(weights: SparseRows, chosen: Indices) -> tuple[Indices, Floats, Indices]:
    """Add up the chosen rows; returns columns, sums and the length of each row."""
    num_rows, number = chosen.shape
    count = len(weights.offsets) - 1
    flat = chosen.reshape(-1)
    lengths = weights.lengths[flat]
    places = spans(weights.offsets[flat], lengths)
    owner = np.repeat(np.repeat(np.arange(num_rows), number), lengths)
    keys = owner * count + weights.columns[places]
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], weights.values[places][order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    sums = np.add.reduceat(values, starts) if len(starts) else values
    keys = keys[starts]
    return keys % count, sums, np.bincount(keys // count, minlength=num_rows)


def overlaps(row: tuple[Indices, Floats], inverted: SparseRows, count: int) -> NDArray[np.float64]:
    """Return the sum of minima of one row with each of ``count`` others.

    Args:
        row: Columns and values of one image.
        inverted: For each column which images have an entry there, and how large.
        count: Number of other images.
    """
    columns, mine = row
    starts = inverted.offsets[columns]
    lengths = inverted.offsets[columns + 1] - starts
    places = spans(starts, lengths)
    least = np.minimum(inverted.values[places], np.repeat(mine, lengths))
    sums = np.bincount(inverted.columns[places], least, minlength=count)
    return sums.astype(np.float64, copy=False)  # without entries bincount returns integers


# Query x gallery similarities are kept from the first pass where they are no larger than this.
_KEEP_MIB = 1024.0
_ROWS_MIB = 64.0


def score_reranked(
    query: Features,
    gallery: Features,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    cross_camera: bool = True,
    memory_mib: float | None = None,
) -> RetrievalScores:
    """Score queries in a gallery after k-reciprocal re-ranking.

    Args:
        query: Query set.
        gallery: Gallery; products are made in float32 on its device. Junk is dropped first on both
            sides: it is nobody's neighbour.
        k1: Neighbours that can be reciprocal.
        k2: Neighbours whose weights are averaged; 1 leaves this out.
        lambda_value: Share of the original distance, 0 to 1.
        cross_camera: False also counts images of the query's own camera.
        memory_mib: Most memory to use besides the features (MiB); None: what is free.

    Raises:
        UserError: As for ``score_retrieval``, or a parameter is out of range.
    """
    gallery = _without_junk(gallery)
    matching = Matching.of(query, gallery, cross_camera=cross_camera, memory_mib=memory_mib)
    sound = query.pids.cpu().numpy() != JUNK_PID
    renumbered = replace(matching, queries=(np.cumsum(sound) - 1)[matching.queries])
    reranker = Reranker(
        _without_junk(query),
        gallery,
        k1=k1,
        k2=k2,
        lambda_value=lambda_value,
        memory_mib=memory_mib,
    )
    images = reranker.images
    collector = RankCollector(matching, images.gallery.broken)
    rows = max(1, int(_ROWS_MIB * MIB / (16 * images.num_gallery)))
    with torch.inference_mode(), exact_float32(images.device):
        for chosen in query_chunks(matching, rows):
            collector.add(chosen, reranker.distances(renumbered.queries[chosen]).neg_())
    return scores_of_ranks(
        collector.result(worst_rows(images.query, images.gallery, renumbered)),
        matching,
        query,
        degenerate=images.query.degenerate or images.gallery.degenerate,
        cross_camera=cross_camera,
    )


def _without_junk(images: Features) -> Features:
    keep = images.pids != JUNK_PID
    if bool(keep.all()):
        return images
    on_device = keep.to(images.embeddings.device)
    camids = images.camids[keep.to(images.camids.device)]
    return Features(images.embeddings[on_device], images.pids[keep], camids)


class Reranker:
    """The re-ranked distances of queries (Q) to a gallery (G); takes the time when it is made.

    Args:
        query: Query set without junk.
        gallery: Gallery without junk.
        k1: Neighbours that can be reciprocal.
        k2: Neighbours whose weights are averaged.
        lambda_value: Share of the original distance.
        memory_mib: Most memory to use besides the features (MiB); None: what is free.

    Raises:
        UserError: A parameter is out of range, a set is empty, the feature sizes differ, or it
            would not fit into memory.
    """

    def __init__(
        self,
        query: Features,
        gallery: Features,
        *,
        k1: int = 20,
        k2: int = 6,
        lambda_value: float = 0.3,
        memory_mib: float | None = None,
    ) -> None:
        _check(query, gallery, k1, k2, lambda_value)
        with torch.inference_mode():
            self.images = Images(UnitFeatures.of(query), UnitFeatures.of(gallery))
            self._lambda = lambda_value
            self._kept = self._room_for_similarities(k1, memory_mib)
            with exact_float32(self.images.device):
                self._prepare(k1, k2)

    def distances(self, index: Indices) -> Tensor:
        """Return the distances of some queries to the gallery, float32 (R, G) on its device."""
        images = self.images
        if self._kept is None:
            gallery = np.arange(images.num_query, len(images))
            similarity = torch.empty(len(index), images.num_gallery, device=images.device)
            rows = images.unit_rows(index)
            for at in range(0, images.num_gallery, TILE):
                part = images.unit_rows(gallery[at : at + TILE])
                torch.mm(rows, part.t(), out=similarity[:, at : at + TILE])
        else:
            similarity = self._kept[torch.as_tensor(index, device=images.device)]
        jaccard = np.empty(similarity.shape, np.float32)
        for row, number in enumerate(index.tolist()):
            shared = overlaps(self._weights.row(number), self._inverted, images.num_gallery)
            jaccard[row] = 1.0 - shared / (2.0 - shared)
        scale = torch.as_tensor(self._scale[index], device=images.device)[:, None]
        original = similarity.neg_().add_(1.0).mul_(2.0 * self._lambda).div_(scale)
        return original.add_(torch.as_tensor(jaccard).to(images.device), alpha=1 - self._lambda)

    def _prepare(self, k1: int, k2: int) -> None:
        images, count = self.images, len(self.images)
        with Progress(count * (count + TILE) // 2, "Re-rank: neighbours", unit="pair") as bar:
            neighbors = nearest_neighbors(
                images, max(k1 + 1, k2), on_tile=self._keep, on_done=_telling(bar, count)
            )
        # The furthest image of a row is at distance 1; where all are alike there is none, and what
        # rounding leaves of their distances must not be blown up.
        lowest = neighbors.lowest
        scale = np.where(lowest < 1.0, 2.0 * (1.0 - lowest), np.float32(1.0))
        weights = reciprocal_weights(images, neighbors, k1=k1, scale=scale)
        self._weights = averaged(weights, neighbors.index[:, :k2]) if k2 > 1 else weights
        self._inverted = self._weights.transposed(images.num_query, count)
        self._scale = scale[: images.num_query]

    def _keep(self, rows: slice, columns: slice, tile: Tensor) -> None:
        start = self.images.num_query
        if self._kept is not None and rows.start < start <= columns.start:
            self._kept[rows, columns.start - start : columns.stop - start] = tile

    def _room_for_similarities(self, k1: int, memory_mib: float | None) -> Tensor | None:
        """Refuse what would not fit; return room for query x gallery where there is plenty."""
        images, count = self.images, len(self.images)
        budget = memory_budget_mib(images.device, memory_mib)
        dim = images.gallery.embeddings.shape[1]
        tile = min(TILE, count)
        # Tiles with their neighbours, then for each image k1 + 1 neighbours in several arrays and
        # the averaged weights, of which a crowded gallery has the most.
        needed = (5 * 4 * tile * tile + 3 * 4 * tile * dim + count * (k1 + 1) * 160) / MIB
        needed += 2 * _ROWS_MIB
        what = f"Re-ranking {images.num_query:,} queries and {images.num_gallery:,} gallery images"
        require_memory(what, needed, budget, "free memory, or set TEST.RE_RANKING off")
        kept = 4 * images.num_query * images.num_gallery / MIB
        keep = kept <= min(_KEEP_MIB, (budget - needed) / 2)
        tell_memory(what, needed + (kept if keep else 0), count * count)
        shape = (images.num_query, images.num_gallery)
        return torch.empty(shape, device=images.device) if keep else None


def _telling(bar: Progress, count: int) -> Callable[[int], None]:
    """Return what moves the bar, and logs once how long the whole will take."""
    start = time.perf_counter()
    told = [count * count < WORTH_TELLING]

    def done(pairs: int) -> None:
        bar.update(pairs)
        if not told[0]:
            told[0] = True
            total = count * count / 2 / pairs * (time.perf_counter() - start)
            get_logger().info("Re-ranking: about %.0f s", total * 1.2)

    return done


def _check(query: Features, gallery: Features, k1: int, k2: int, lambda_value: float) -> None:
    if k1 < 1 or k2 < 1 or not 0.0 <= lambda_value <= 1.0:
        raise UserError(
            f"re-ranking got k1 {k1}, k2 {k2}, lambda {lambda_value}; expected k1 and k2 of at "
            "least 1 and lambda from 0 to 1"
        )
    if not len(query) or not len(gallery):
        raise UserError(
            f"re-ranking got {len(query)} queries and {len(gallery)} gallery images; expected at "
            "least one of each"
        )
    sizes = query.embeddings.shape[1], gallery.embeddings.shape[1]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"query features have size {sizes[0]} and gallery features {sizes[1]}; expected one "
            "size: take both from the same network"
        )
