"""How the processes of one start find out which start it is.

Torchrun keeps one store for all starts of a run, and what an earlier one left there must not be
taken for this one's. The number of restarts that it tells its processes is no help: a machine
counts only the failures of its own processes.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch import distributed

from utils.errors import UserError

PATIENCE_S = 600.0  # torchrun starts the processes together; a cold disk may delay one by minutes
_POLL_S = 0.02


def number_of_start(
    store: distributed.Store, rank: int, size: int, patience_s: float = PATIENCE_S
) -> int:
    """Return the number of this start of the processes, counted from 1: the same on all.

    The first process draws it and answers each call by name, so that nobody hears an answer that
    was given to another process; one of an earlier start that still waits is answered too.

    Args:
        store: Of all starts.
        rank: This process.
        size: Number of processes.
        patience_s: How long to wait for the others.

    Raises:
        UserError: Somebody has not come.
    """
    own = distributed.PrefixStore("securereid/roll_call", store)
    return _answer(own, size, patience_s) if rank == 0 else _call(own, rank, patience_s)


def _call(store: distributed.Store, rank: int, patience_s: float) -> int:
    name = uuid.uuid4().hex
    store.set(f"name/{rank}", name)
    try:
        store.wait([f"start/{name}"], timedelta(seconds=patience_s))
    except RuntimeError as error:
        raise UserError(
            f"rank 0 has not answered rank {rank} within {patience_s:g} s, or its store is gone "
            f"({str(error).splitlines()[0]})"
        ) from error
    start = int(store.get(f"start/{name}"))
    store.set(f"heard/{start}/{rank}", "")
    return start


def _answer(store: distributed.Store, size: int, patience_s: float) -> int:
    start = int(store.add("starts", 1))
    missing, give_up = list(range(1, size)), time.monotonic() + patience_s
    while missing:
        for rank in missing:
            if store.check([f"name/{rank}"]):  # of an earlier start, perhaps: until heard
                store.set(f"start/{store.get(f'name/{rank}').decode()}", str(start))
        missing = [rank for rank in missing if not store.check([f"heard/{start}/{rank}"])]
        if missing and time.monotonic() > give_up:
            raise UserError(
                f"rank {', '.join(map(str, missing))} has not come within {patience_s:g} s; see "
                "that every machine was started and reaches the first one"
            )
        time.sleep(_POLL_S)
    return start
