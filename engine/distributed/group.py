"""Joining and leaving the process group of a run that torchrun started.

torchrun's agent does the rest: it stops the other processes when one fails, reports the first error
and, with ``--max-restarts``, starts all processes again. In a single process nothing happens here:
no process group, no thread.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from engine.distributed.processes import running_as, world
from utils.device import resolve_device
from utils.errors import UserError
from utils.logger import Progress
from utils.world import World

# The other processes wait in a collective while the first one scores a large test set. The time
# limit need not be short: the agent notices a process that has ended.
COLLECTIVE_TIMEOUT = timedelta(hours=2)

_WAIT_FOR_AGENT_S = 5.0  # the agent looks at its processes ten times a second


@contextmanager
def joined() -> Iterator[World]:
    """Join the process group while the context is open; yields the processes of the run.

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
            timeout=COLLECTIVE_TIMEOUT,
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

    Raises:
        UserError: torchrun may restart the processes of several machines with the same store.
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
    """Return the device that was asked for; each process of a machine gets its own GPU.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        device_id: The GPU that ``auto`` and ``cuda`` mean in a single process.

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
    """Raise if torchrun started a program that does not share its work among processes.

    Raises:
        UserError: It did.
    """
    if World.from_environment().size > 1:
        raise UserError(
            f"torchrun can run tools/main.py, tools/attack.py and `tools/protect.py protect`, not "
            f"{program}; run it with python3"
        )
