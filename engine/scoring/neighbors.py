"""Nearest neighbours of every image among all query and gallery images.

The similarity matrix is symmetric: a tile above the diagonal serves its rows and its columns, which
saves half of the products. The N x N matrix is never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import UnitFeatures
from engine.scoring.matching import Indices

TILE = 2048


class Images:
    """N query and gallery images under one numbering, queries first.

    Args:
        query: Queries, numbers 0..Q-1.
        gallery: Gallery, numbers Q..N-1, on the device that computes the products.
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
        if is_query.all():
            return self._rows(self.query, numbers)
        if not is_query.any():
            return self._rows(self.gallery, numbers - self.num_query)
        rows = torch.empty(len(numbers), self.gallery.embeddings.shape[1], device=self.device)
        mask = torch.as_tensor(is_query, device=self.device)
        rows[mask] = self._rows(self.query, numbers[is_query])
        rows[~mask] = self._rows(self.gallery, numbers[~is_query] - self.num_query)
        return rows

    def _rows(self, part: UnitFeatures, positions: Indices) -> Tensor:
        index = torch.as_tensor(positions, device=part.embeddings.device)
        return part.unit_rows(index).to(self.device)

    def blocks(self) -> list[tuple[int, int]]:
        """Return the ranges of numbers that tiles span; a range never mixes query and gallery."""
        starts = [*range(0, self.num_query, TILE), *range(self.num_query, len(self), TILE)]
        stops = [*starts[1:], len(self)]
        return list(zip(starts, stops, strict=True))


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The K most similar images of each of N images, itself included, closest first.

    Attributes:
        index: Numbers of the images; ties are in ascending order (N, K).
        similarity: Cosine to each, float32 (N, K).
        lowest: Cosine to the least similar of all N images, float32 (N,).
    """

    index: Indices
    similarity: NDArray[np.float32]
    lowest: NDArray[np.float32]


def nearest_neighbors(
    images: Images,
    keep: int,
    *,
    on_tile: Callable[[slice, slice, Tensor], None] = lambda *_: None,
    on_done: Callable[[int], None] = lambda _: None,
) -> Neighbors:
    """Return the nearest neighbours of every image.

    Args:
        images: Query and gallery.
        keep: Number of neighbours (K), at most N.
        on_tile: Called with every tile of similarities: rows, columns, values. Rows come before
            columns, so the tiles cover query x gallery completely.
        on_done: Called with the number of similarities computed since the last call.
    """
    keep = min(keep, len(images))
    best = _Best(len(images), keep, images.device)
    blocks = images.blocks()
    for number, (start, stop) in enumerate(blocks):
        rows = images.unit_rows(np.arange(start, stop))
        for first, last in blocks[number:]:
            columns = rows if first == start else images.unit_rows(np.arange(first, last))
            tile = rows @ columns.t()
            on_tile(slice(start, stop), slice(first, last), tile)
            best.add(slice(start, stop), tile, first)
            if first != start:
                best.add(slice(first, last), tile.t().contiguous(), start)
            on_done(tile.numel())
    return Neighbors(
        best.index.cpu().numpy(), best.similarity.cpu().numpy(), best.lowest.cpu().numpy()
    )


def pair_similarities(images: Images, left: Indices, right: Indices) -> NDArray[np.float32]:
    """Return the cosine of each pair of images (P,)."""
    result = np.empty(len(left), np.float32)
    for start in range(0, len(left), TILE):
        part = slice(start, start + TILE)
        product = images.unit_rows(left[part]) * images.unit_rows(right[part])
        result[part] = product.sum(1).cpu().numpy()
    return result


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
