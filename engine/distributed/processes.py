"""The processes of a run: which one this is, and values and rows of all of them.

Every function is a no-op in a process that runs alone.

Tensors and values that are not gradients travel between CPUs, through gloo, on any device: a
gallery's features need no room on a GPU, and one path has to be tested. Gradients and batch
statistics of networks on GPUs go through NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from utils.files import locked_folder
from utils.world import World

Value = TypeVar("Value")

_ALONE = World()
_current = [_ALONE]


def world() -> World:
    """Return the processes of this run; a single process outside ``group.joined``."""
    return _current[0]


def is_main() -> bool:
    """Return whether this process writes and logs: the first of the run, or the only one."""
    return world().is_main


@contextmanager
def running_as(processes: World) -> Iterator[None]:
    """Let :func:`world` return other processes while the context is open."""
    _current[0] = processes
    try:
        yield
    finally:
        _current[0] = _ALONE


@contextmanager
def locked_by_main(folder: str | Path) -> Iterator[None]:
    """Let the first process hold the lock of the run's output folder; the others wait for it."""
    with locked_folder(folder) if is_main() else nullcontext():
        barrier()
        yield


def share(items: Sequence[Value]) -> Sequence[Value]:
    """Return this process's share of a list: every N-th item of N processes."""
    here = world()
    return items if here.size == 1 else items[here.rank :: here.size]


def barrier() -> None:
    """Wait until all processes have called this function."""
    if world().size > 1:
        distributed.all_reduce(torch.zeros(1))  # through gloo; distributed.barrier would use NCCL


def broadcast(value: Value) -> Value:
    """Return the first process's value on all of them; it is pickled."""
    if world().size == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def from_main(make: Callable[[], Value]) -> Value:
    """Call a function on the first process only, and return its value on all of them."""
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


def all_gather(value: Value) -> list[Value]:
    """Return every process's value, by rank, on all of them; values are pickled."""
    here = world()
    if here.size == 1:
        return [value]
    values: list[Any] = [None] * here.size
    distributed.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, by rank, on the first process.

    Args:
        rows: (K, ...); K may differ between processes and be 0.

    Returns:
        All rows on the first process, on the device of its rows; the others get their own rows.
    """
    here = world()
    if here.size == 1:
        return rows
    counts = all_gather(len(rows))
    own = rows.cpu().contiguous()
    # Collectives need equal shapes, so every process sends as many rows as the largest share has.
    sent = own.new_zeros(max(counts), *own.shape[1:])
    sent[: len(own)] = own
    parts = [torch.empty_like(sent) for _ in counts] if here.is_main else None
    distributed.gather(sent, parts, dst=0)
    if parts is None:
        return rows
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(
        rows.device
    )
