"""Ranks of the true matches: how many gallery images lie closer, counted a chunk at a time.

A rank is 1 + the number of gallery images that are closer, or as close and earlier in the gallery.
So no gallery is put in order and no distance matrix is held: a chunk of query rows is multiplied
with the gallery, and each match's similarity is compared with its row while that is in the cache.
For many matches in one row the bare values of the row are ordered there and looked up instead.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import UnitFeatures
from engine.scoring.matching import Indices, Matching, Ragged
from engine.scoring.products import product_chunks

# A broken gallery image (NaN) is further than every sound one, a broken match than every wrong
# image, so that no order of the files makes it look found; an ignored image is further than all.
_BROKEN_MATCH = float(np.finfo(np.float32).min)
_BROKEN = _BROKEN_MATCH / 2
# Ordering a row's values for fewer matches than this never pays.
_FEWEST_WORTH_SORTING = 4
# Starting threads for fewer values than this never pays.
_WORTH_THREADS = 2**20

Row = NDArray[np.float32]


@torch.inference_mode()
def rank_matches(
    queries: Sequence[UnitFeatures],
    gallery: UnitFeatures,
    matching: Matching,
    *,
    memory_mib: float | None = None,
) -> list[Indices]:
    """Rank every match of every scored query, for several query sets in one pass.

    Args:
        queries: Query sets of the same images, e.g. raw and protected.
        gallery: Gallery (G, D).
        matching: What counts for whom.
        memory_mib: Most memory to use besides the features (MiB); None: what is free.

    Returns:
        For each query set the 1-based ranks, laid out like ``matching.matches.values`` but
        ascending within a query, int64. Where features are broken or constant a rank is the
        worst possible one: wrong images first.

    Raises:
        UserError: Not even one query would fit into memory.
    """
    collector = [RankCollector(matching, gallery.broken, gallery.inverse_norm) for _ in queries]
    for chosen, blocks in product_chunks(queries, gallery, matching, memory_mib=memory_mib):
        for one, block in zip(collector, blocks, strict=True):
            one.add(chosen, block)
    return [
        one.result(worst_rows(query, gallery, matching))
        for one, query in zip(collector, queries, strict=True)
    ]


def worst_rows(query: UnitFeatures, gallery: UnitFeatures, matching: Matching) -> Indices:
    """Return which scored queries' features say nothing about who is shown."""
    if gallery.constant:
        return np.arange(len(matching.queries))
    return np.flatnonzero(query.broken.cpu().numpy()[matching.queries])


class RankCollector:
    """Ranks the matches of all scored queries, some rows at a time.

    Args:
        matching: What each query has to find.
        broken: Gallery images that come last, bool (G,), where the rows will lie.
        scale: The rows are multiplied with it (G,); None for rows that are ready.
    """

    def __init__(self, matching: Matching, broken: Tensor, scale: Tensor | None = None) -> None:
        self._matching, self._scale = matching, scale
        self._is_broken = broken.cpu().numpy()
        self._broken = broken.nonzero().squeeze(1)
        self._junk = torch.as_tensor(matching.junk, device=broken.device)
        self._ranks = np.empty(len(matching.matches.values), np.int64)

    def add(self, chosen: Indices, similarity: Tensor) -> None:
        """Rank the matches of some queries; ``similarity`` (R, G) is overwritten."""
        matches = self._matching.matches.take(chosen)
        hidden = self._matching.ignored.take(chosen)
        count = (
            self._count_with_numpy if similarity.device.type == "cpu" else self._count_with_torch
        )
        found = count(similarity, matches, hidden)
        owner = np.repeat(np.arange(len(chosen)), matches.lengths)
        self._ranks[self._matching.matches.places(chosen)] = found[np.lexsort((found, owner))]

    def result(self, worst: Indices) -> Indices:
        """Return all ranks; the queries in ``worst`` get the worst possible ones."""
        layout = self._matching.matches
        for index in worst:
            first, stop = layout.offsets[index : index + 2]
            last = self._matching.num_candidates[index]
            self._ranks[first:stop] = last - np.arange(stop - first)[::-1]
        return self._ranks

    def _count_with_numpy(self, similarity: Tensor, matches: Ragged, hidden: Ragged) -> Indices:
        """Go row by row, while a row is in the cache."""
        scale = None if self._scale is None else self._scale.numpy()
        broken, junk = self._broken.numpy(), self._junk.numpy()
        products, ranks = similarity.numpy(), np.empty(len(matches.values), np.int64)

        def count(rows: Indices, way: Callable[[Row, Indices, Row], Indices]) -> None:
            row, spare = np.empty((2, products.shape[1]), np.float32)
            for index in rows.tolist():
                with np.errstate(invalid="ignore"):  # infinity of a broken image times 0
                    np.multiply(products[index], 1.0 if scale is None else scale, out=row)
                row[broken] = _BROKEN
                row[junk] = -np.inf
                row[hidden[index]] = -np.inf
                targets = matches[index]
                if len(broken):
                    row[targets[self._is_broken[targets]]] = _BROKEN_MATCH
                found = way(row, targets, spare)
                ranks[matches.offsets[index] : matches.offsets[index + 1]] = found

        many = matches.lengths >= matches_worth_sorting(products.shape[1])
        count(np.flatnonzero(~many), _ranks_by_comparing)
        rows = np.flatnonzero(many)
        if len(rows) * products.shape[1] < _WORTH_THREADS:
            count(rows, _ranks_by_bisection)
            return ranks
        parts = np.array_split(rows, torch.get_num_threads())
        with ThreadPoolExecutor(len(parts)) as pool:  # ordering leaves the interpreter's lock free
            list(pool.map(lambda part: count(part, _ranks_by_bisection), parts))
        return ranks

    def _count_with_torch(self, similarity: Tensor, matches: Ragged, hidden: Ragged) -> Indices:
        """Go match by match over all rows at once: a GPU waits only at the end."""
        device = similarity.device
        if self._scale is not None:
            similarity.mul_(self._scale)
        similarity.index_fill_(1, self._broken, _BROKEN)
        similarity.index_fill_(1, self._junk, -torch.inf)
        every = np.ones(len(hidden.values), np.bool_)
        for part, chosen, value in (
            (hidden, every, -torch.inf),
            (matches, self._is_broken[matches.values], _BROKEN_MATCH),
        ):
            owner = np.repeat(np.arange(len(part)), part.lengths)
            where = (owner[chosen], part.values[chosen])
            similarity.index_put_(
                tuple(torch.as_tensor(one, device=device) for one in where),
                similarity.new_tensor(value),
            )

        lengths = matches.lengths
        real = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        padded = np.zeros(real.shape, np.int64)
        padded[real] = matches.values
        ranks = _ranks_of_columns(similarity, torch.as_tensor(padded, device=device))
        return np.asarray(ranks.cpu().numpy()[real], np.int64)


def _ranks_of_columns(similarity: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each target column (R, M) in its row of similarities (R, G)."""
    values = similarity.gather(1, targets)
    ranks, equal = torch.empty_like(targets), torch.empty_like(targets)
    for place in range(targets.shape[1]):
        value = values[:, place : place + 1]
        ranks[:, place] = (similarity > value).sum(1) + 1
        equal[:, place] = (similarity == value).sum(1)
    if bool((equal > 1).any()):  # ties are rare: only then are indices compared
        columns = torch.arange(similarity.shape[1], device=similarity.device)
        for place in range(targets.shape[1]):
            one = slice(place, place + 1)
            earlier = (similarity == values[:, one]) & (columns < targets[:, one])
            ranks[:, place] += earlier.sum(1)
    return ranks


def _ranks_by_comparing(row: Row, targets: Indices, spare: Row) -> Indices:
    """Return the rank of each target by comparing its similarity with the whole row."""
    flags = spare.view(np.bool_)[: len(row)]
    furthest = targets[np.argmin(row[targets])]
    # Only images at least as close as the furthest match can come before a match.
    np.greater_equal(row, row[furthest], out=flags)
    if 4 * np.count_nonzero(flags) < len(row):
        candidates = np.flatnonzero(flags)
        targets = np.searchsorted(candidates, targets)
        row, flags = row[candidates], flags[: len(candidates)]
    ranks = np.empty(len(targets), np.int64)
    for place, target in enumerate(targets.tolist()):
        value = row[target]
        np.greater_equal(row[:target], value, out=flags[:target])  # earlier images win a tie
        np.greater(row[target:], value, out=flags[target:])
        ranks[place] = np.count_nonzero(flags) + 1
    return ranks


def _ranks_by_bisection(row: Row, targets: Indices, spare: Row) -> Indices:
    """Return the rank of each target by looking its similarity up in the ordered values."""
    values = row[targets]
    np.copyto(spare, row)
    spare.sort()  # bare values: which image they belong to does not matter
    upper = np.searchsorted(spare, values, side="right")
    ranks = len(row) - upper + 1
    tied = upper - np.searchsorted(spare, values, side="left") > 1
    for value in np.unique(values[tied]):
        equal = np.flatnonzero(row == value)
        mine = np.flatnonzero(values == value)
        ranks[mine] += np.searchsorted(equal, targets[mine])
    return ranks


@lru_cache(maxsize=64)
def matches_worth_sorting(length: int) -> int:
    """Return from how many matches on ordering a row's values beats comparing it for each match.

    That depends on the processor (numpy orders float32 with vector instructions where it has
    them) and on the threads, so it is measured, once for a length. Ranks are the same either way.
    """
    row = np.random.default_rng(0).standard_normal(length, dtype=np.float32)
    targets, spare = np.zeros(1, np.int64), np.empty_like(row)
    row[0] = row.min()
    ways = (_ranks_by_comparing, _ranks_by_bisection)
    times = [
        min(timeit.repeat(partial(way, row, targets, spare), number=1, repeat=5)) for way in ways
    ]
    # Comparing for one match takes two passes, the first being shared by all matches.
    matches = times[1] / (times[0] / 2) / torch.get_num_threads()
    return max(_FEWEST_WORTH_SORTING, round(matches))
