"""Which training a restart by torchrun goes on with.

One run of several processes: taking part in it, and leaving it.

``torchrun`` starts the processes; ``joined`` takes part. In a process that runs alone (started
without torchrun, or as the only one) it is a no-op: no process group, no thread. Who a process is
says ``utils.world``, what processes tell each other ``engine.distributed.processes``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from engine.checkpoint import NATIVE_NAMES
from engine.distributed.processes import all_gather, barrier, running_as, world
from engine.distributed.roll_call import number_of_start
from engine.distributed.signals import handling
from engine.distributed.watch import Terminated, Watch
from utils.device import resolve_device
from utils.errors import UserError, naming_keys
from utils.files import write_text
from utils.progress import Progress
from utils.world import World

_NAME = ".torchrun"


@dataclass(frozen=True)
class Launch:
    """One start of the processes by torchrun, and the training in OUTPUT_DIR.

    A restart (``--max-restarts``) goes on from the last checkpoint by itself. It must not go on
    with a training that was in OUTPUT_DIR before and that the first start refused to overwrite. So
    the first start leaves a mark once it has accepted the folder, and only then a restart resumes.

    Attributes:
        mark: Where the mark is; None where torchrun has not started this process.
        resumes: Whether to go on from the last checkpoint although SOLVER.RESUME may not say so.
    """

    mark: Path | None
    resumes: bool

    @classmethod
    def begin(cls, folder: Path) -> Launch:
        """Look whether this is a restart; a first start takes away what an older one left."""
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is None:
            return cls(None, resumes=False)
        mark = folder / _NAME
        if not world().restarts:
            mark.unlink(missing_ok=True)
            return cls(mark, resumes=False)
        accepted = mark.is_file() and mark.read_text("utf-8") == run_id
        return cls(mark, resumes=accepted and (folder / NATIVE_NAMES["latest"]).is_file())

    def accepted(self) -> None:
        """Note that this launch trains in the folder."""
        if self.mark is not None:
            write_text(self.mark, os.environ["TORCHELASTIC_RUN_ID"])

    @staticmethod
    def done(folder: Path) -> None:
        """Take the mark away when all is written: a later launch is another run."""
        (folder / _NAME).unlink(missing_ok=True)


# Others wait in a collective while the first process scores a large test set. It need not be short:
# a process that ends or falls silent is noticed by engine.distributed.watch, not by this.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


@contextmanager
def joined() -> Iterator[World]:
    """Take part in the run that torchrun started.

    If any process fails, is killed or falls silent, all end within a minute, and the first one says
    which it was and why.

    Raises:
        RankLostError: Another process failed; only on the first one, the others end at once.
        UserError: The processes have not come together.
    """
    found = World.from_environment()
    if found.size == 1:
        with running_as(found):
            yield found
    else:
        with _group(found) as together:
            yield together


@contextmanager
def _group(found: World) -> Iterator[World]:
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    store = _store_of_all_starts(found)
    start = number_of_start(store, found.rank, found.size)
    shown, Progress.shown = Progress.shown, found.is_main
    watch = Watch(found.rank, found.size, start=start)  # before anything waits for the others
    try:
        with handling({signal.SIGTERM: _terminated}):
            distributed.init_process_group(
                backend,
                # Addresses that an earlier start has left are those of processes that are gone.
                store=distributed.PrefixStore(f"securereid/group/{start}", store),
                rank=found.rank,
                world_size=found.size,
                timeout=COLLECTIVE_TIMEOUT,
            )
            with running_as(found):
                # Of several machines only the one that failed counts its restart.
                counted = max(all_gather(found.restarts))
            found = replace(found, restarts=max(counted, start - 1))
            with running_as(found):
                yield found
                barrier()
    except BaseException as error:
        with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN)):
            watch.end_with(error)
        raise
    finally:
        watch.close()
        Progress.shown = shown
    # Torch 2.4 joins gloo's threads with Python's lock held, which one that is just finishing the
    # last collective may want, and hangs: one in some hundred ends, none of 1,550 with this.
    time.sleep(0.05)
    distributed.destroy_process_group()


def _store_of_all_starts(found: World) -> distributed.Store:
    """Return the store that torchrun may keep over its restarts, or else one of the first rank.

    Torch 2.4 gives each restart a part of it, by a number that machines do not agree on.
    """
    store, _, _ = next(
        distributed.rendezvous("env://", found.rank, found.size, timeout=COLLECTIVE_TIMEOUT)
    )
    while isinstance(store, distributed.PrefixStore):
        store = store.underlying_store
    return store


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
        with naming_keys("MODEL.DEVICE", "MODEL.DEVICE_ID"):
            return resolve_device(name, device_id)
    with naming_keys("MODEL.DEVICE", "MODEL.DEVICE_ID"):
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
