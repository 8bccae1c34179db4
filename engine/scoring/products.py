"""Products of queries and gallery in chunks that fit into memory, for every retrieval score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.scoring.features import UnitFeatures
from engine.scoring.matching import Indices, Matching
from utils.device import exact_float32
from utils.logger import Progress
from utils.memory import MIB, memory_budget_mib, require_memory, tell_memory

_CHUNK_MIB = {"cpu": 64.0, "cuda": 1024.0}
_CONVERT_ROWS = 4096


@torch.inference_mode()
def product_chunks(
    queries: Sequence[UnitFeatures],
    gallery: UnitFeatures,
    matching: Matching,
    *,
    memory_mib: float | None = None,
    caller_mib: float = 0.0,
    caller_row_bytes: int = 0,
) -> Iterator[tuple[Indices, tuple[Tensor, ...]]]:
    """Yield the products of the scored queries with the gallery, some queries at a time.

    Args:
        queries: Query sets of the same images; they are multiplied together.
        gallery: Gallery (G, D), on the device that computes the products.
        matching: The queries to score.
        memory_mib: Memory limit in addition to the features (MiB); None: the free memory.
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
    budget = memory_budget_mib(device, memory_mib)
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
