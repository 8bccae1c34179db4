"""What each process has found on its share of one side, put together on the first one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distributed.processes import all_gather, gather_rows, world
from engine.scoring.image_quality import QualityAccumulator


@dataclass(frozen=True)
class Share:
    """What a pass over some images of query or gallery found, in their order.

    Attributes:
        embeddings: By what the re-ID network was given, batches (B, D).
        pids, camids: Of each batch (B,).
        refused: How many images each key state's holder could not open.
        quality: Of each kind of image, against raw.
    """

    embeddings: dict[str, list[Tensor]]
    pids: list[Tensor]
    camids: list[Tensor]
    refused: dict[str, int]
    quality: dict[str, QualityAccumulator]


def gathered(own: Share) -> Share:
    """Return the shares of all processes, in the order of their ranks, on the first of them.

    The others get their own back, with something in it even if it was empty. Alone, a process gets
    its own.
    """
    if world().size == 1:
        return own
    # A process whose share is empty has seen neither states nor kinds, nor the size of a row.
    seen = all_gather(
        (
            {state: _outline(parts[0]) for state, parts in own.embeddings.items()},
            list(own.quality),
            own.refused,
        )
    )
    outlines = next(outlines for outlines, _, _ in seen if outlines)
    kinds = next(kinds for _, kinds, _ in seen if kinds)
    refused: dict[str, int] = {}
    for _, _, counts in seen:
        for state, count in counts.items():
            refused[state] = refused.get(state, 0) + count
    nothing = torch.zeros(0, dtype=torch.int64)
    return Share(
        {
            state: [gather_rows(_rows(own.embeddings.get(state, []), outline))]
            for state, outline in outlines.items()
        },
        [gather_rows(torch.cat(own.pids) if own.pids else nothing)],
        [gather_rows(torch.cat(own.camids) if own.camids else nothing)],
        refused,
        {
            kind: QualityAccumulator.of_rows(
                gather_rows(own.quality.get(kind, QualityAccumulator()).rows())
            )
            for kind in kinds
        },
    )


def _outline(rows: Tensor) -> tuple[int, torch.dtype]:
    return rows.shape[1], rows.dtype


def _rows(parts: list[Tensor], outline: tuple[int, torch.dtype]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, outline[0], dtype=outline[1])
