"""One run of several processes: who am I, and what do the others have?

``torchrun`` starts the processes and tells each its rank through the environment; ``joined`` takes
part. Everything here is a no-op in a process that runs alone (started without torchrun, or as the
only one): no process group, no thread, no copy.

Tensors and values that are not gradients travel between CPUs, through gloo, whatever the networks
run on: a gallery's features need no room on a GPU, and there is one path to test. Gradients and
batch statistics of networks on GPUs go through NCCL.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from engine.signals import handling
from engine.watch import RankLostError, Terminated, Watch
from utils.device import resolve_device
from utils.errors import UserError
from utils.progress import Progress
from utils.world import World

Value = TypeVar("Value")

# Others wait in a collective while the first process scores a large test set. It need not be short:
# a process that ends or falls silent is noticed by engine.watch, not by this.
COLLECTIVE_TIMEOUT = timedelta(hours=2)

_ALONE = World()
_current = [_ALONE]


def world() -> World:
    """Return the processes of this run; one that runs alone outside :func:`joined`."""
    return _current[0]


def is_main() -> bool:
    """Tell whether this process writes, logs and decides: the first, or the only one."""
    return world().is_main


@contextmanager
def joined() -> Iterator[World]:
    """Take part in the run that torchrun started.

    If any process fails, is killed or falls silent, all end within a minute, and the first one says
    which it was and why.

    Raises:
        RankLostError: Another process failed; only on the first one, the others end at once.
    """
    found = World.from_environment()
    _current[0] = found
    try:
        if found.size == 1:
            yield found
        else:
            with _group(found):
                yield found
    finally:
        _current[0] = _ALONE


@contextmanager
def _group(found: World) -> Iterator[None]:
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    shown, Progress.shown = Progress.shown, found.is_main
    watch = Watch(found.rank, found.size, attempt=found.restarts)
    try:
        with handling({signal.SIGTERM: _terminated}):
            yield
            barrier()
    except BaseException as error:
        with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)):
            watch.end_with(error)
        raise
    finally:
        watch.close()
        Progress.shown = shown
    distributed.destroy_process_group()


def _terminated(*_: object) -> None:
    raise Terminated


def leave(code: int) -> None:
    """End this process with an exit code; one that failed does not wait for the others."""
    if code and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # tearing down a group whose members are gone can take for ever
    sys.exit(code)


def device_of_rank(name: str = "auto", device_id: str | int = "0") -> torch.device:
    """Return the device that was asked for; each process of a machine has a GPU of its own.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_id: Which GPU ``auto`` and ``cuda`` mean in a process that runs alone.

    Raises:
        UserError: It is not there, or there are more processes than GPUs.
    """
    here = world()
    if here.local_size == 1:
        return resolve_device(name, device_id)
    device = resolve_device(name, "0")
    if device.type == "cpu":
        return device
    if ":" in name:
        raise UserError(
            f"MODEL.DEVICE is {name!r}, but {here.local_size} processes on this machine would "
            "share it; expected auto or cuda, which give each a GPU of its own"
        )
    count = torch.cuda.device_count()
    if here.local_size > count:
        raise UserError(
            f"torchrun started {here.local_size} processes on this machine, but torch sees {count} "
            f"GPU{'s' if count > 1 else ''}; expected at most one process for each GPU: "
            f"--nproc_per_node {count}, or MODEL.DEVICE cpu"
        )
    return torch.device("cuda", here.local_rank)


def refuse_sharing(program: str) -> None:
    """Refuse to run a program several times at once that does not share its work.

    Raises:
        UserError: torchrun started it.
    """
    if World.from_environment().size > 1:
        raise UserError(
            f"torchrun shares out tools/main.py, tools/attack.py and `tools/protect.py protect`, "
            f"not {program}; run it with python3"
        )


def share(items: Sequence[Value]) -> Sequence[Value]:
    """Return this process's share of a list: every N-th item of N processes."""
    here = world()
    return items if here.size == 1 else items[here.rank :: here.size]


def barrier() -> None:
    """Wait until all processes are here."""
    if world().size > 1:
        distributed.all_reduce(torch.zeros(1))


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


def all_gather(value: Value) -> list[Value]:
    """Return every process's value, by rank, on all of them; values are pickled."""
    here = world()
    if here.size == 1:
        return [value]
    values: list[Any] = [None] * here.size
    distributed.all_gather_object(values, value)
    return values


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


__all__ = [
    "RankLostError", "World", "all_gather", "barrier", "broadcast", "device_of_rank",
    "first_on_machine", "from_main", "gather_rows", "is_main", "joined", "leave",
    "refuse_sharing", "share", "world",
]  # fmt: skip
