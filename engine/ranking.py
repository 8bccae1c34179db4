"""Ranks of the true matches: how many gallery images lie closer, counted a chunk at a time.

A rank is 1 + the number of gallery images that are closer, or as close and earlier in the gallery.
So nothing is sorted and no distance matrix is held: a chunk of query rows is multiplied with the
gallery, and each match's similarity is compared with its row while the row is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.features import UnitFeatures
from engine.matching import Indices, Matching, Ragged
from engine.memory import MIB, memory_budget_mib, require_memory
from engine.precision import full_precision

_CHUNK_MIB = {"cpu": 64.0, "cuda": 1024.0}
_CONVERT_ROWS = 4096
# A broken gallery image (NaN) is further than every sound one, an ignored image than all.
_BROKEN = float(np.finfo(np.float32).min)
# From here on one sort of the row is cheaper than a comparison for each match.
_MANY_MATCHES = 48

Row = NDArray[np.float32]


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
    device = gallery.embeddings.device
    rows = _chunk_rows(queries, gallery, memory_mib)
    # Queries with about as many matches go together, so that padding costs nothing.
    order = np.argsort(matching.matches.lengths, kind="stable")
    ranks = [np.empty(len(matching.matches.values), np.int64) for _ in queries]
    excluded = torch.as_tensor(matching.junk, device=device)
    count = _count_on_cpu if device.type == "cpu" else count_on_device
    product = torch.empty(min(rows, len(order)) * len(queries), len(gallery.embeddings))
    product = product.to(device) if device.type != "cpu" else product
    with full_precision(device), torch.inference_mode():
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            similarity = product[: len(chosen) * len(queries)]
            _similarities(queries, matching.queries[chosen], gallery, similarity)
            wanted, hidden = matching.matches.take(chosen), matching.ignored.take(chosen)
            for side, block in enumerate(similarity.split(len(chosen))):
                found = count(block, gallery, excluded, wanted, hidden)
                _store(ranks[side], matching.matches, chosen, found)
    for side, query in enumerate(queries):
        _worst_ranks(ranks[side], query, gallery, matching)
    return ranks


def _chunk_rows(
    queries: Sequence[UnitFeatures], gallery: UnitFeatures, memory_mib: float | None
) -> int:
    num_gallery, dim = gallery.embeddings.shape
    device = gallery.embeddings.device
    budget = memory_budget_mib(device, memory_mib)
    row_mib = len(queries) * 4 * (num_gallery + 3 * dim) / MIB
    fixed_mib = 4 * num_gallery * 3 / MIB
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


def _similarities(
    queries: Sequence[UnitFeatures], index: Indices, gallery: UnitFeatures, out: Tensor
) -> None:
    """Write query x gallery products into ``out``; the gallery's norms are applied later."""
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


def _count_on_cpu(
    similarity: Tensor, gallery: UnitFeatures, excluded: Tensor, wanted: Ragged, hidden: Ragged
) -> Indices:
    """Rank the matches of each row; numpy, whose comparisons are vectorised and cheap to call."""
    scale, junk = gallery.inverse_norm.numpy(), excluded.numpy()
    broken = np.flatnonzero(gallery.broken.numpy())
    row, flags = np.empty(len(scale), np.float32), np.empty(len(scale), np.bool_)
    ranks = np.empty(len(wanted.values), np.int64)
    for index, products in enumerate(similarity.numpy()):
        np.multiply(products, scale, out=row)
        row[broken] = _BROKEN
        row[junk] = -np.inf
        row[hidden[index]] = -np.inf
        targets = wanted[index]
        if len(targets) >= _MANY_MATCHES:
            found = _ranks_by_sorting(row, targets)
        else:
            found = _ranks_by_counting(row, targets, flags)
        ranks[wanted.offsets[index] : wanted.offsets[index + 1]] = found
    return ranks


def _ranks_by_counting(row: Row, targets: Indices, flags: NDArray[np.bool_]) -> Indices:
    """Return the rank of each target by comparing its similarity with the row."""
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


def _ranks_by_sorting(row: Row, targets: Indices) -> Indices:
    """Return the rank of each target from the sorted row, with ties resolved by index."""
    ascending, values = np.sort(row), row[targets]
    upper = np.searchsorted(ascending, values, side="right")
    ranks = len(row) - upper + 1
    tied = upper - np.searchsorted(ascending, values, side="left") > 1
    for value in np.unique(values[tied]):
        equal = np.flatnonzero(row == value)
        mine = np.flatnonzero(values == value)
        ranks[mine] += np.searchsorted(equal, targets[mine])
    return ranks


def count_on_device(
    similarity: Tensor, gallery: UnitFeatures, excluded: Tensor, wanted: Ragged, hidden: Ragged
) -> Indices:
    """Rank the matches of each row with torch: no synchronisation but one at the end.

    Args:
        similarity: Products (R, G), overwritten.
        gallery: For the norms.
        excluded: Gallery positions that no row sees.
        wanted: Matches of each row.
        hidden: Ignored images of each row.

    Returns:
        Ranks laid out like ``wanted.values``, int64 on the CPU.
    """
    device = similarity.device
    similarity.mul_(gallery.inverse_norm)
    similarity.masked_fill_(gallery.broken, _BROKEN)
    similarity.index_fill_(1, excluded, -torch.inf)
    owner = np.repeat(np.arange(len(hidden)), hidden.lengths)
    where = (torch.as_tensor(owner, device=device), torch.as_tensor(hidden.values, device=device))
    similarity.index_put_(where, similarity.new_tensor(-torch.inf))

    lengths = wanted.lengths
    real = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
    padded = np.zeros(real.shape, np.int64)
    padded[real] = wanted.values
    targets = torch.as_tensor(padded, device=device)
    values = similarity.gather(1, targets)
    columns = torch.arange(similarity.shape[1], device=device)
    closer, equal = torch.empty_like(targets), torch.empty_like(targets)
    for place in range(targets.shape[1]):
        value = values[:, place : place + 1]
        closer[:, place] = (similarity > value).sum(1)
        equal[:, place] = (similarity == value).sum(1)
    ranks = closer + 1
    if bool((equal > 1).any()):  # ties are rare: only then are indices compared
        for place in range(targets.shape[1]):
            column = slice(place, place + 1)
            earlier = (similarity == values[:, column]) & (columns < targets[:, column])
            ranks[:, place] += earlier.sum(1)
    return ranks.cpu().numpy()[real]


def _store(ranks: Indices, layout: Ragged, chosen: Indices, found: Indices) -> None:
    """Put the ranks of some queries where they belong, ascending within each query."""
    taken = layout.take(chosen)
    owner = np.repeat(np.arange(len(chosen)), taken.lengths)
    found = found[np.lexsort((found, owner))]
    places = np.arange(len(found)) - taken.offsets[owner] + layout.offsets[chosen[owner]]
    ranks[places] = found


def _worst_ranks(
    ranks: Indices, query: UnitFeatures, gallery: UnitFeatures, matching: Matching
) -> None:
    """Overwrite what features without a direction got by luck."""
    broken = query.broken.cpu().numpy()[matching.queries]
    if gallery.constant:
        broken[:] = True
    layout = matching.matches
    for index in np.flatnonzero(broken):
        last = matching.num_candidates[index]
        count = layout.lengths[index]
        ranks[layout.offsets[index] : layout.offsets[index + 1]] = last - np.arange(count)[::-1]
