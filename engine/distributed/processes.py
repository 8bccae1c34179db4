"""The processes of a run: which one is this, and what do the others have?

Everything here is a no-op in a process that runs alone.

Tensors and values that are not gradients travel between CPUs, through gloo, whatever the networks
run on: a gallery's features need no room on a GPU, and there is one path to test. Gradients and
batch statistics of networks on GPUs go through NCCL.

What each process has found on its share of one side, put together on the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from engine.scoring.image_quality import QualityAccumulator
from utils.world import World

Value = TypeVar("Value")

# Torch fills the tensors of a collective outside of inference mode, and 2.4 refuses to where they
# were made in it: an evaluation would not learn what the other processes have found.
_out_of_inference_mode = torch.inference_mode(False)

# Kept: a thread of torch 2.4 may be the last to let go of a collective's tensors. If that ends a
# Python object it waits for Python's lock, which whoever ends the group holds while waiting for the
# thread: after the last barrier both would wait for ever.
_NOTHING = torch.zeros(1)

_ALONE = World()
_current = [_ALONE]


def world() -> World:
    """Return the processes of this run; one that runs alone outside :func:`joined`."""
    return _current[0]


def is_main() -> bool:
    """Tell whether this process writes, logs and decides: the first, or the only one."""
    return world().is_main


@contextmanager
def running_as(found: World) -> Iterator[None]:
    """Have :func:`world` return other processes for a while."""
    _current[0] = found
    try:
        yield
    finally:
        _current[0] = _ALONE


def share(items: Sequence[Value]) -> Sequence[Value]:
    """Return this process's share of a list: every N-th item of N processes."""
    here = world()
    return items if here.size == 1 else items[here.rank :: here.size]


@_out_of_inference_mode
def barrier() -> None:
    """Wait until all processes are here."""
    if world().size > 1:
        distributed.all_reduce(_NOTHING)


@_out_of_inference_mode
def broadcast(value: Value) -> Value:
    """Return the first process's value on all of them; it is pickled."""
    if world().size == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def from_main(make: Callable[[], Value]) -> Value:
    """Call a function on the first process only, and return what it gave on all of them."""
    here = world()
    made = [make()] if here.is_main else [None]
    return broadcast(made)[0]  # type: ignore[return-value]


def first_on_machine(make: Callable[[], Value]) -> Value:
    """Call a function that may write files: on one process of each machine, then on the others."""
    here = world()
    if here.size == 1:
        return make()
    made = [make()] if here.local_rank == 0 else []
    barrier()
    return made[0] if made else make()


@_out_of_inference_mode
def all_gather(value: Value) -> list[Value]:
    """Return every process's value, by rank, on all of them; values are pickled."""
    here = world()
    if here.size == 1:
        return [value]
    values: list[Any] = [None] * here.size
    distributed.all_gather_object(values, value)
    return values


@_out_of_inference_mode
def gather_rows(rows: Tensor) -> Tensor:
    """Put the rows of all processes one after the other, on the first process.

    Args:
        rows: (K, ...), K may differ from process to process and be 0.

    Returns:
        On the first process all rows, on the device of its own; on the others their own.
    """
    here = world()
    if here.size == 1:
        return rows
    counts = all_gather(len(rows))
    own = rows.cpu().contiguous()
    # Every process sends as many rows as the largest has: collectives want equal shapes.
    sent = own.new_zeros(max(counts), *own.shape[1:])
    sent[: len(own)] = own
    parts = [torch.empty_like(sent) for _ in counts] if here.is_main else None
    distributed.gather(sent, parts, dst=0)
    if parts is None:
        return rows
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(
        rows.device
    )


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
