"""Rank and number of the processes that torchrun started, without loading torch."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The processes of a run."""

    rank: int = 0  # number of this process, from 0
    size: int = 1  # number of processes
    local_rank: int = 0  # number of this process on this machine
    local_size: int = 1  # number of processes on this machine
    restarts: int = 0  # how often torchrun has restarted the processes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes, logs and decides."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """Return what torchrun's environment variables contain; a single process without them."""
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


ALONE = World()  # a process that torchrun did not start
