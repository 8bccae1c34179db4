"""The sparse half of k-reciprocal re-ranking: who vouches for whom, and how much.

Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.scoring.neighbors import Images, Neighbors, pair_similarities
from engine.scoring.ragged import Indices, offsets_of, spans

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
