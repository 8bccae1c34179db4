"""Products of queries and gallery in chunks that fit into memory, and ranks of the true matches.

The rank of a match is 1 + the number of gallery images that are closer, or equally close and
earlier in the gallery. On the CPU the similarities of one query are sorted, and the matches are
looked up in them by bisection. On a GPU each match is compared with its whole row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.features import UnitFeatures
from engine.scoring.matching import Indices, Matching, Ragged
from utils.device import exact_float32
from utils.logger import Progress
from utils.memory import MIB, memory_budget_mib, require_memory, tell_memory

# Similarities of broken gallery images (NaN). They are below those of all valid images, and those
# of broken matches are lower still: no order of the files gives a broken match a good rank.
_BROKEN_MATCH = float(np.finfo(np.float32).min)
_BROKEN = _BROKEN_MATCH / 2
# With fewer similarities than this, starting threads takes longer than it saves.
_WORTH_THREADS = 2**20

Row = NDArray[np.float32]


@torch.inference_mode()
def rank_matches(
    queries: Sequence[UnitFeatures], gallery: UnitFeatures, matching: Matching
) -> list[Indices]:
    """Return the rank of every match of every scored query, for several query sets.

    The query sets show the same images, e.g. raw and protected. For each of them the ranks begin
    at 1, int64, in the layout of ``matching.matches.values``, but ascending within a query. Matches
    whose features are broken or constant get the worst possible ranks.

    Raises:
        UserError: One query alone does not fit into memory.
    """
    collectors = [RankCollector(matching, gallery.broken, gallery.inverse_norm) for _ in queries]
    for chosen, blocks in product_chunks(queries, gallery, matching):
        for collector, block in zip(collectors, blocks, strict=True):
            collector.add(chosen, block)
    return [
        collector.result(worst_rows(query, gallery, matching))
        for collector, query in zip(collectors, queries, strict=True)
    ]


def worst_rows(query: UnitFeatures, gallery: UnitFeatures, matching: Matching) -> Indices:
    """Return the scored queries whose similarities carry no information about identity."""
    if gallery.constant:
        return np.arange(len(matching.queries))
    return np.flatnonzero(query.broken.cpu().numpy()[matching.queries])


class RankCollector:
    """Ranks the matches of all scored queries, some queries at a time.

    Broken gallery images (G,) are ranked last. ``scale`` (G,) turns products into cosines; None if
    the rows are cosines.
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
        if self._scale is not None:
            similarity.mul_(self._scale)
        similarity.index_fill_(1, self._broken, _BROKEN)
        similarity.index_fill_(1, self._junk, -torch.inf)
        owner = np.repeat(np.arange(len(chosen)), matches.lengths)
        broken = self._is_broken[matches.values]
        hidden_owner = np.repeat(np.arange(len(chosen)), hidden.lengths)
        for rows, columns, value in (
            (hidden_owner, hidden.values, -torch.inf),
            (owner[broken], matches.values[broken], _BROKEN_MATCH),
        ):
            index = [torch.as_tensor(part, device=similarity.device) for part in (rows, columns)]
            similarity.index_put_(tuple(index), similarity.new_tensor(value))
        on_cpu = similarity.device.type == "cpu"
        ranks = (_ranks_by_sorting if on_cpu else _ranks_by_comparing)(similarity, matches)
        self._ranks[self._matching.matches.positions(chosen)] = ranks[np.lexsort((ranks, owner))]

    def result(self, worst: Indices) -> Indices:
        """Return all ranks; the queries in ``worst`` get the worst possible ones."""
        layout = self._matching.matches
        for index in worst:
            first, stop = layout.offsets[index : index + 2]
            last = self._matching.num_candidates[index]
            self._ranks[first:stop] = last - np.arange(stop - first)[::-1]
        return self._ranks


def _ranks_by_sorting(similarity: Tensor, matches: Ragged) -> Indices:
    """Return the ranks of all matches, on the CPU: each row is sorted while it is in the cache."""
    table, ranks = similarity.numpy(), np.empty(len(matches.values), np.int64)

    def rank(rows: Indices) -> None:
        spare = np.empty(table.shape[1], np.float32)
        for index in rows.tolist():
            part = slice(matches.offsets[index], matches.offsets[index + 1])
            ranks[part] = _ranks_in_row(table[index], matches.values[part], spare)

    rows = np.arange(len(matches))
    if table.size < _WORTH_THREADS:
        rank(rows)
        return ranks
    parts = np.array_split(rows, torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as pool:  # sorting releases the interpreter lock
        list(pool.map(rank, parts))
    return ranks


def _ranks_by_comparing(similarity: Tensor, matches: Ragged) -> Indices:
    """Return the ranks of all matches; a GPU is awaited once, at the end."""
    lengths = matches.lengths
    real = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
    padded = np.zeros(real.shape, np.int64)
    padded[real] = matches.values
    ranks = _ranks_of_columns(similarity, torch.as_tensor(padded, device=similarity.device))
    return np.asarray(ranks.cpu().numpy()[real], np.int64)


def _ranks_of_columns(similarity: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of each target column (R, M) in its row of similarities (R, G)."""
    values = similarity.gather(1, targets)
    ranks, equal = torch.empty_like(targets), torch.empty_like(targets)
    for column in range(targets.shape[1]):
        value = values[:, column : column + 1]
        ranks[:, column] = (similarity > value).sum(1) + 1
        equal[:, column] = (similarity == value).sum(1)
    if bool((equal > 1).any()):  # ties are rare; only they need a comparison of positions
        positions = torch.arange(similarity.shape[1], device=similarity.device)
        for column in range(targets.shape[1]):
            part = slice(column, column + 1)
            earlier = (similarity == values[:, part]) & (positions < targets[:, part])
            ranks[:, column] += earlier.sum(1)
    return ranks


def _ranks_in_row(row: Row, targets: Indices, spare: Row) -> Indices:
    """Return the rank of each target in a row; ``spare`` (G,) is overwritten."""
    values = row[targets]
    np.copyto(spare, row)
    spare.sort()
    upper = np.searchsorted(spare, values, side="right")
    ranks = len(row) - upper + 1
    tied = upper - np.searchsorted(spare, values, side="left") > 1
    for value in np.unique(values[tied]):
        equal = np.flatnonzero(row == value)
        mine = np.flatnonzero(values == value)
        ranks[mine] += np.searchsorted(equal, targets[mine])
    return ranks


_CHUNK_MIB = {"cpu": 64.0, "cuda": 1024.0}
_CONVERT_ROWS = 4096


@torch.inference_mode()
def product_chunks(
    queries: Sequence[UnitFeatures],
    gallery: UnitFeatures,
    matching: Matching,
    *,
    caller_mib: float = 0.0,
    caller_row_bytes: int = 0,
) -> Iterator[tuple[Indices, tuple[Tensor, ...]]]:
    """Yield the products of the scored queries with the gallery, some queries at a time.

    Args:
        queries: Query sets of the same images; they are multiplied together.
        gallery: Gallery (G, D), on the device that computes the products.
        matching: The queries to score.
        caller_mib: Part of the memory that the caller needs (MiB).
        caller_row_bytes: Memory that the caller needs for each row of products (bytes).

    Yields:
        Positions in ``matching.queries`` (R,) and, for each query set, the products of unit
        queries with the gallery, float32 (R, G). Multiply them with ``gallery.inverse_norm`` to
        get cosines. The caller may overwrite them; the next chunk does.

    Raises:
        UserError: One query alone does not fit into memory.
    """
    device = gallery.embeddings.device
    budget = memory_budget_mib(device)
    most = _chunk_rows(queries, gallery, budget, caller_mib, caller_row_bytes)
    rows = min(most, len(matching.queries))
    shape = (rows * len(queries), len(gallery.embeddings))
    count, num_gallery = len(queries) * len(matching.queries), shape[1]
    what = f"Scoring {count:,} queries in {num_gallery:,} gallery images, {shape[0]:,} at a time"
    tell_memory(what, 4 * shape[0] * num_gallery / MIB + caller_mib, count * num_gallery)
    product = torch.empty(shape, dtype=torch.float32, device=device)
    with Progress(len(matching.queries), "Score", unit="query") as bar:
        for chosen in query_chunks(matching, rows):
            similarity = product[: len(chosen) * len(queries)]
            with exact_float32(device):  # not around the yield: callers keep their own settings
                _multiply(queries, matching.queries[chosen], gallery, similarity)
            yield chosen, similarity.split(len(chosen))
            bar.update(len(chosen))


def query_chunks(matching: Matching, rows: int) -> Iterator[Indices]:
    """Yield positions of scored queries, at most ``rows`` at a time.

    Queries with a similar number of matches are in one chunk, which keeps padded arrays small.
    """
    order = np.argsort(matching.matches.lengths, kind="stable")
    for start in range(0, len(order), rows):
        yield order[start : start + rows]


def _chunk_rows(
    queries: Sequence[UnitFeatures],
    gallery: UnitFeatures,
    budget: float,
    caller_mib: float,
    caller_row_bytes: int,
) -> int:
    num_gallery, dim = gallery.embeddings.shape
    device = gallery.embeddings.device
    row_mib = (len(queries) * 4 * (num_gallery + 3 * dim) + caller_row_bytes) / MIB
    fixed_mib = 4 * num_gallery * 3 / MIB + caller_mib
    if gallery.embeddings.dtype != torch.float32:
        fixed_mib += 4 * dim * min(_CONVERT_ROWS, num_gallery) / MIB
    require_memory(
        f"Ranking one query among {num_gallery} gallery images",
        fixed_mib + row_mib,
        budget,
        "score a smaller gallery or free memory",
    )
    room = min(budget - fixed_mib, _CHUNK_MIB.get(device.type, 64.0))
    return max(1, int(room / row_mib))


def _multiply(
    queries: Sequence[UnitFeatures], index: Indices, gallery: UnitFeatures, out: Tensor
) -> None:
    """Write query x gallery products into ``out``; the gallery's norms are not applied."""
    device = gallery.embeddings.device
    rows = [
        query.unit_rows(torch.as_tensor(index, device=query.embeddings.device)).to(device)
        for query in queries
    ]
    stacked = rows[0] if len(rows) == 1 else torch.cat(rows)
    matrix = gallery.embeddings
    if matrix.dtype == torch.float32:
        torch.mm(stacked, matrix.t(), out=out)
        return
    for start in range(0, len(matrix), _CONVERT_ROWS):
        block = matrix[start : start + _CONVERT_ROWS].float()
        torch.mm(stacked, block.t(), out=out[:, start : start + len(block)])
