"""Which process of a run is this one?

``torchrun`` starts the processes and tells each its rank through the environment. A process that
runs alone (started without torchrun, or as the only one) is the first of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: This process, counted from 0.
        size: Number of processes.
        local_rank, local_size: The same on this machine.
        restarts: How often torchrun has restarted the processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs and decides."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """Read what torchrun says; a process that runs alone where it says nothing."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if not all(name in os.environ for name in names):
            return cls()
        return cls(
            rank=int(os.environ["RANK"]),
            size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )


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
