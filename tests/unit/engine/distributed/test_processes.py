"""The processes of a run and their shares. Several processes: test_distributed.py."""

from __future__ import annotations

import pytest
import torch

from engine.distributed.processes import (
    all_gather,
    barrier,
    broadcast,
    from_main,
    gather_rows,
    running_as,
    share,
    world,
)
from utils.world import World

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
WHERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "2"}


def test_the_world_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, *WHERE):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World()
    for name, value in (LAUNCHED | WHERE).items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(3, 4, 1, 2, restarts=2)
    assert world() == World()  # until it has joined


def test_shares_are_every_nth_item() -> None:
    shares = []
    for rank in range(3):
        with running_as(World(rank, 3)):
            shares.append(list(share(range(8))))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert world() == World()


def test_collectives_do_nothing_in_a_single_process() -> None:
    items = [3, 1, 2]
    assert share(items) is items
    assert all_gather("mine") == ["mine"]
    assert broadcast("mine") == "mine"
    assert from_main(lambda: None) is None
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
    barrier()
