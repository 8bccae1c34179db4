"""The processes of a run: joining them, which one this is, and values and rows of all of them.

Every function is a no-op in a process that runs alone: no process group, no thread. torchrun's
agent does the rest: it stops the other processes when one fails, reports the first error and, with
``--max-restarts``, starts all processes again.

Tensors and values that are not gradients travel between CPUs, through gloo, on any device: a
gallery's features need no room on a GPU, and one path has to be tested. Gradients and batch
statistics of networks on GPUs go through NCCL.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from utils.device import resolve_device
from utils.errors import UserError
from utils.files import locked_folder
from utils.logger import Progress
from utils.world import ALONE, World

Value = TypeVar("Value")

_current = [ALONE]


def world() -> World:
    """Return the processes of this run; a single process outside of ``joined``."""
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
        _current[0] = ALONE


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
    return broadcast(make() if is_main() else None)  # type: ignore[return-value]


def first_on_machine(make: Callable[[], Value]) -> Value:
    """Call a function that may write files: on one process of each machine, then on the others."""
    made = [make()] if world().local_rank == 0 else []
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
    """Return the rows (K, ...) of all processes, by rank, on the first process.

    K may differ between processes and be 0. The device is that of the process's rows. The other
    processes get their own rows.
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


# The other processes wait in a collective while the first one scores a large test set. The time
# limit need not be short: the agent notices a process that has ended.
COLLECTIVE_TIMEOUT = timedelta(hours=2)

_WAIT_FOR_AGENT_S = 5.0  # the agent looks at its processes ten times a second


@contextmanager
def joined(timeout: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[World]:
    """Join the process group while the context is open; yields the processes of the run.

    A process waits for the others for at most ``timeout``.

    An error that ends the run is recorded where torchrun's report reads it, as
    ``torch.distributed.elastic.multiprocessing.errors.record`` does.
    """
    processes = World.from_environment()
    if processes.size == 1:
        with running_as(processes):
            yield processes
        return
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    shown, Progress.shown = Progress.shown, processes.is_main
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=_store(processes),
            rank=processes.rank,
            world_size=processes.size,
            timeout=timeout,
        )
        with running_as(processes):
            yield processes
    except Exception as error:
        if isinstance(error, RuntimeError):
            # A collective raises this when another process has ended. If so, the agent stops this
            # process during the wait, and its report names the process that ended first.
            time.sleep(_WAIT_FOR_AGENT_S)
        get_error_handler().record_exception(error)
        raise
    finally:
        Progress.shown = shown
    distributed.destroy_process_group()


def _store(processes: World) -> distributed.Store:
    """Return the store in which the processes of this start find each other.

    torchrun's agent keeps one store over all restarts, and addresses in it may belong to processes
    of an earlier start. So each start gets a prefix. Machines count restarts differently: over
    several machines each start needs a new store instead.
    """
    store, _, _ = next(distributed.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    several = processes.size > processes.local_size
    if several and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError(
            "--max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
            "environment of torchrun, on every machine; set it, or leave --max-restarts out"
        )
    return distributed.PrefixStore(f"start_{processes.restarts}", store)


def leave(code: int) -> None:
    """End this process with an exit code; a failed process does not wait for the others."""
    if code and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # destroying a group whose members are gone can block
    sys.exit(code)


def device_of_rank(name: str = "auto", device_id: str | int = "0") -> torch.device:
    """Return the device that was asked for (`resolve_device`); each process gets its own GPU.

    Raises:
        UserError: The device does not exist, or there are more processes than GPUs.
    """
    here = world()
    if here.local_size == 1:
        return resolve_device(name, device_id)
    device = resolve_device(name, "0")
    if device.type == "cpu":
        return device
    if ":" in name:
        raise UserError(
            f"the device is {name!r}, but {here.local_size} processes on this machine would share "
            "it; expected auto or cuda, which give each process its own GPU"
        )
    count = torch.cuda.device_count()
    if here.local_size > count:
        raise UserError(
            f"torchrun started {here.local_size} processes on this machine, but torch sees {count} "
            f"GPU{'s' if count > 1 else ''}; expected at most one process for each GPU: "
            f"--nproc_per_node {count}, or the device cpu"
        )
    return torch.device("cuda", here.local_rank)


def refuse_sharing(program: str) -> None:
    """Raise if torchrun started a program that does not share its work among processes."""
    if World.from_environment().size > 1:
        raise UserError(
            f"torchrun can run tools/main.py, tools/attack.py and `tools/protect.py protect`, not "
            f"{program}; run it with python3"
        )
