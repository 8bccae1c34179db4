"""k-reciprocal re-ranking that keeps only the near neighbours of each image.

Definition, shared with the published evaluations: d = 2 (1 - cosine) over query and gallery
together, each row divided by its largest value. Each image has k1 + 1 neighbours, itself included.
A reciprocal set grows by the reciprocal sets (round(k1 / 2)) of those members that overlap it by
more than two thirds. Weights are exp(-d), normalised, then averaged over the first k2 neighbours.
The Jaccard distance follows from sums of minima of weights. The result is
(1 - lambda) Jaccard + lambda d.

The similarity matrix is symmetric: a tile above the diagonal serves its rows and its columns, which
saves half of the products. The N x N matrix is never stored.

Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import Features, UnitFeatures
from engine.scoring.matching import JUNK_PID, Indices, Matching, offsets_of
from engine.scoring.ranking import RankCollector, query_chunks, worst_rows
from engine.scoring.retrieval import RetrievalScores, scores_of_ranks
from utils.device import exact_float32
from utils.errors import UserError
from utils.logger import Progress
from utils.memory import MIB, memory_budget_mib, require_memory, tell_memory

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TILE = 2048
# Query x gallery similarities up to this size are kept from the first pass.
_KEEP_MIB = 1024.0
_CHUNK_MIB = 64.0
_ROWS = 512
_NONE = -1  # fills up rows of image numbers

Floats = NDArray[np.float32]


def score_reranked(
    query: Features,
    gallery: Features,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    cross_camera: bool = True,
) -> RetrievalScores:
    """Return retrieval scores after k-reciprocal re-ranking.

    Junk is removed from both sides first, so that it is not a neighbour of any image.

    Args:
        query: Query set.
        gallery: Gallery; its device computes the products, in float32.
        k1: Neighbours that can be reciprocal.
        k2: Neighbours whose weights are averaged; 1 turns this off.
        lambda_value: Weight of the original distance, 0 to 1.
        cross_camera: Ignore gallery images of the query's identity and camera.

    Raises:
        UserError: As for ``score_retrieval``, or a parameter is out of range.
    """
    gallery = _without_junk(gallery)
    matching = Matching.of(query, gallery, cross_camera=cross_camera)
    valid = query.pids.cpu().numpy() != JUNK_PID
    renumbered = replace(matching, queries=(np.cumsum(valid) - 1)[matching.queries])
    reranker = Reranker(
        _without_junk(query), gallery, k1=k1, k2=k2, lambda_value=lambda_value,
    )  # fmt: skip
    images = reranker.images
    collector = RankCollector(matching, images.gallery.broken)
    rows = max(1, int(_CHUNK_MIB * MIB / (16 * images.num_gallery)))
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


class Reranker:
    """Re-ranked distances of queries (Q) to a gallery (G), both without junk.

    The constructor finds the neighbours and computes the weights, which takes most of the time. Its
    arguments are those of ``score_reranked``.

    Raises:
        UserError: A parameter is out of range, a set is empty, the feature sizes differ, or the
            memory does not suffice.
    """

    def __init__(
        self,
        query: Features,
        gallery: Features,
        *,
        k1: int = 20,
        k2: int = 6,
        lambda_value: float = 0.3,
    ) -> None:
        _check(query, gallery, k1, k2, lambda_value)
        with torch.inference_mode():
            self.images = Images(UnitFeatures.of(query), UnitFeatures.of(gallery))
            self._lambda = lambda_value
            self._kept = self._room_for_similarities(k1)
            with exact_float32(self.images.device):
                self._prepare(k1, k2)

    def distances(self, index: Indices) -> Tensor:
        """Return the distances of some queries to the gallery, float32 (R, G) on its device."""
        images = self.images
        if self._kept is None:
            gallery = np.arange(images.num_query, len(images))
            similarity = torch.empty(len(index), images.num_gallery, device=images.device)
            rows = images.unit_rows(index)
            for start in range(0, images.num_gallery, TILE):
                part = images.unit_rows(gallery[start : start + TILE])
                torch.mm(rows, part.t(), out=similarity[:, start : start + TILE])
        else:
            similarity = self._kept[torch.as_tensor(index, device=images.device)]
        jaccard = np.empty(similarity.shape, np.float32)
        for row, number in enumerate(index.tolist()):
            shared = overlaps(self._weights, number, self._of_gallery)
            jaccard[row] = 1.0 - shared / (2.0 - shared)
        scale = torch.as_tensor(self._scale[index], device=images.device)[:, None]
        original = similarity.neg_().add_(1.0).mul_(2.0 * self._lambda).div_(scale)
        return original.add_(torch.as_tensor(jaccard).to(images.device), alpha=1 - self._lambda)

    def _prepare(self, k1: int, k2: int) -> None:
        images = self.images
        neighbors = nearest_neighbors(images, max(k1 + 1, k2), self._kept)
        # The furthest image of a row is at distance 1. If all images are equal, only rounding
        # errors are left, and dividing by them would amplify them.
        lowest = neighbors.lowest
        scale = np.where(lowest < 1.0, 2.0 * (1.0 - lowest), np.float32(1.0))
        self._weights = weights = reciprocal_weights(images, neighbors, k1=k1, k2=k2, scale=scale)
        # Rows are images, columns the gallery: which gallery images have weight on an image.
        self._of_gallery = weights[images.num_query :].T.tocsr()
        self._scale = scale[: images.num_query]

    def _room_for_similarities(self, k1: int) -> Tensor | None:
        """Check the memory; return an array for query x gallery if there is plenty."""
        images, count = self.images, len(self.images)
        budget = memory_budget_mib(images.device)
        dim = images.gallery.embeddings.shape[1]
        tile = min(TILE, count)
        # Tiles with their neighbours; then, for each image, k1 + 1 neighbours in several arrays,
        # and the averaged weights, which have most entries in a crowded gallery.
        needed = (5 * 4 * tile * tile + 3 * 4 * tile * dim + count * (k1 + 1) * 160) / MIB
        needed += 2 * _CHUNK_MIB
        what = f"Re-ranking {images.num_query:,} queries and {images.num_gallery:,} gallery images"
        require_memory(what, needed, budget, "free memory, or set TEST.RE_RANKING off")
        kept = 4 * images.num_query * images.num_gallery / MIB
        keep = kept <= min(_KEEP_MIB, (budget - needed) / 2)
        tell_memory(what, needed + (kept if keep else 0), count * count)
        shape = (images.num_query, images.num_gallery)
        return torch.empty(shape, device=images.device) if keep else None


def reciprocal_weights(
    images: Images, neighbors: Neighbors, *, k1: int, k2: int, scale: Floats
) -> csr_array:
    """Return each image's weights over the images that are reciprocally close to it.

    These are exp(-distance / scale) over the expanded reciprocal set, each row normalised to 1 and
    averaged over the rows of its first k2 neighbours, itself included, float32 (N, N).

    Args:
        images: For the similarities of pairs that are not near neighbours.
        neighbors: At least k1 + 1 neighbours of each image, itself included.
        k1: Neighbours that can be reciprocal.
        k2: Neighbours whose weights are averaged.
        scale: Largest distance of each image (N,).
    """
    ranked = neighbors.index[:, : k1 + 1]
    core = _reciprocal(ranked)
    half = _reciprocal(ranked[:, : round(k1 / 2) + 1])
    parts = [_expand(core[start : start + _ROWS], half) for start in range(0, len(core), _ROWS)]
    lengths = np.concatenate([(part != _NONE).sum(1) for part in parts])
    members = np.concatenate([part[part != _NONE] for part in parts])
    owner = np.repeat(np.arange(len(core)), lengths)
    similarity = _similarities(images, neighbors, owner, members)
    weights = np.exp(-2.0 * (1.0 - similarity) / scale[owner])
    sums = np.bincount(owner, weights, minlength=len(core))
    weights = (weights / sums[owner]).astype(np.float32)
    from scipy.sparse import csr_array  # noqa: PLC0415 - every command would load it

    square = (len(core), len(core))
    result = csr_array((weights, members, offsets_of(lengths)), shape=square)
    if k2 == 1:
        return result
    first = neighbors.index[:, :k2]
    share = np.full(first.size, 1 / first.shape[1], np.float32)
    starts = np.arange(0, first.size + 1, first.shape[1])
    return csr_array((share, first.reshape(-1), starts), shape=square) @ result


def overlaps(weights: csr_array, row: int, of_gallery: csr_array) -> NDArray[np.float64]:
    """Return the sum of minima of one row of weights with the weights of each gallery image (G,).

    ``weights`` contains all images (N, N); ``of_gallery`` has a row for each of their columns
    (N, G).
    """
    part = slice(weights.indptr[row], weights.indptr[row + 1])
    others = of_gallery[weights.indices[part]]
    mine = np.repeat(weights.data[part], np.diff(others.indptr))
    least = np.minimum(others.data, mine)
    sums = np.bincount(others.indices, least, minlength=of_gallery.shape[1])
    return sums.astype(np.float64, copy=False)  # without entries bincount returns integers


def _reciprocal(ranked: Indices) -> Indices:
    """Return the neighbours that have the image among their neighbours, else -1 (N, k)."""
    result = np.full_like(ranked, _NONE)
    for start in range(0, len(ranked), _ROWS):
        mine = ranked[start : start + _ROWS]
        number = np.arange(start, start + len(mine))
        mutual = (ranked[mine] == number[:, None, None]).any(2)
        result[start : start + _ROWS] = np.where(mutual, mine, _NONE)
    return result


def _expand(core: Indices, half: Indices) -> Indices:
    """Return the expanded sets of some images, ascending, filled up with -1 (R, any)."""
    theirs = half[core]
    theirs[core == _NONE] = _NONE
    exists = theirs != _NONE
    # Fillers equal each other, too: only existing members count.
    shared = (theirs[:, :, :, None] == core[:, None, None, :]).any(3) & exists
    joins = 3 * shared.sum(2) > 2 * exists.sum(2)
    theirs[~joins] = _NONE
    members = np.sort(np.concatenate([core, theirs.reshape(len(core), -1)], 1), axis=1)
    members[:, 1:][members[:, 1:] == members[:, :-1]] = _NONE
    return members


def _similarities(images: Images, neighbors: Neighbors, owner: Indices, members: Indices) -> Floats:
    """Return the cosine of each pair: looked up among the neighbours, or computed."""
    count, keep = neighbors.index.shape
    known = (np.arange(count)[:, None] * count + neighbors.index).reshape(-1)
    order = np.argsort(known)
    known, values = known[order], neighbors.similarity.reshape(-1)[order]
    result = np.empty(len(owner), np.float32)
    missing = np.ones(len(owner), np.bool_)
    for left, right in ((owner, members), (members, owner)):
        pairs = left * count + right
        position = np.minimum(np.searchsorted(known, pairs), count * keep - 1)
        is_known = missing & (known[position] == pairs)
        result[is_known] = values[position[is_known]]
        missing &= ~is_known
    places = np.flatnonzero(missing)
    for part in np.split(places, range(TILE, len(places), TILE)):
        product = images.unit_rows(owner[part]) * images.unit_rows(members[part])
        result[part] = product.sum(1).cpu().numpy()
    return result


def _without_junk(images: Features) -> Features:
    keep = images.pids != JUNK_PID
    if bool(keep.all()):
        return images
    on_device = keep.to(images.embeddings.device)
    camids = images.camids[keep.to(images.camids.device)]
    return Features(images.embeddings[on_device], images.pids[keep], camids)


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


class Images:
    """N query and gallery images under one numbering: queries 0..Q-1, then the gallery.

    Products are computed on the device of the gallery.
    """

    def __init__(self, query: UnitFeatures, gallery: UnitFeatures) -> None:
        self.query, self.gallery = query, gallery
        self.num_query = len(query.embeddings)
        self.num_gallery = len(gallery.embeddings)
        self.device = gallery.embeddings.device

    def __len__(self) -> int:
        """Return the number of images."""
        return self.num_query + self.num_gallery

    def unit_rows(self, numbers: Indices) -> Tensor:
        """Return the unit vectors of some images (len(numbers), D), float32 on the device."""
        is_query = numbers < self.num_query
        rows = torch.empty(len(numbers), self.gallery.embeddings.shape[1], device=self.device)
        for part, chosen, first in (
            (self.query, is_query, 0),
            (self.gallery, ~is_query, self.num_query),
        ):
            index = torch.as_tensor(numbers[chosen] - first, device=part.embeddings.device)
            mask = torch.as_tensor(chosen, device=self.device)
            rows[mask] = part.unit_rows(index).to(self.device)
        return rows

    def blocks(self) -> list[tuple[int, int]]:
        """Return the ranges of numbers that tiles span; a range never mixes query and gallery."""
        starts = [*range(0, self.num_query, TILE), *range(self.num_query, len(self), TILE)]
        stops = [*starts[1:], len(self)]
        return list(zip(starts, stops, strict=True))


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The K most similar images of each of N images, itself included, closest first."""

    index: Indices  # numbers of the images; ties are in ascending order (N, K)
    similarity: NDArray[np.float32]  # cosine to each, float32 (N, K)
    lowest: NDArray[np.float32]  # cosine to the least similar of all N images, float32 (N,)


def nearest_neighbors(images: Images, keep: int, kept: Tensor | None = None) -> Neighbors:
    """Return the ``keep`` nearest neighbours of every image, at most all N.

    The similarities of queries and gallery are written to ``kept`` (Q, G), if it is given.
    """
    count = len(images)
    best = _Best(count, min(keep, count), images.device)
    blocks = images.blocks()
    with Progress(count * (count + TILE) // 2, "Re-rank: neighbours", unit="pair") as bar:
        for number, (start, stop) in enumerate(blocks):
            rows = images.unit_rows(np.arange(start, stop))
            for first, last in blocks[number:]:
                columns = rows if first == start else images.unit_rows(np.arange(first, last))
                tile = rows @ columns.t()
                if kept is not None and start < images.num_query <= first:
                    offset = images.num_query
                    kept[start:stop, first - offset : last - offset] = tile
                best.add(slice(start, stop), tile, first)
                if first != start:
                    best.add(slice(first, last), tile.t().contiguous(), start)
                bar.update(tile.numel())
    return Neighbors(
        best.index.cpu().numpy(), best.similarity.cpu().numpy(), best.lowest.cpu().numpy()
    )


class _Best:
    """The nearest neighbours of every image among the tiles so far."""

    def __init__(self, count: int, keep: int, device: torch.device) -> None:
        self.keep = keep
        self.similarity = torch.full((count, keep), -torch.inf, device=device)
        self.index = torch.full((count, keep), count, dtype=torch.int64, device=device)
        self.lowest = torch.full((count,), torch.inf, device=device)

    def add(self, rows: slice, tile: Tensor, first: int) -> None:
        """Add the similarities of some images (the rows) to the images from ``first`` on."""
        self.lowest[rows] = torch.minimum(self.lowest[rows], tile.amin(1))
        values, columns = _top(tile, self.keep)
        values = torch.cat([self.similarity[rows], values], 1)
        index = torch.cat([self.index[rows], columns + first], 1)
        # Images of earlier tiles have lower numbers, so a stable sort orders ties by number.
        values, order = values.sort(dim=1, descending=True, stable=True)
        self.similarity[rows] = values[:, : self.keep]
        self.index[rows] = index.gather(1, order)[:, : self.keep]


def _top(tile: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of each row and their columns, ties in ascending order."""
    width = tile.shape[1]
    values, columns = tile.topk(min(keep + 1, width), dim=1)
    # topk returns equal values in an unspecified order: such rows are sorted.
    tied = (values[:, 1:] == values[:, :-1]).any(1).nonzero().squeeze(1)
    if len(tied):
        exact, order = tile[tied].sort(dim=1, descending=True, stable=True)
        values[tied] = exact[:, : values.shape[1]]
        columns[tied] = order[:, : values.shape[1]]
    return values[:, :keep], columns[:, :keep]
