"""Who a process is, and which device is its own."""

from __future__ import annotations

import pytest
import torch

from engine import distributed
from engine.distributed import World, device_of_rank, share, world
from utils.errors import UserError

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
WHERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_current", [World(3, 4, 1, 2)])


def test_torchrun_says_who_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, *WHERE):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World()
    for name, value in (LAUNCHED | WHERE).items():
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(3, 4, 1, 2, restarts=2)
    assert world() == World()  # until it has joined


def test_alone_there_is_nothing_to_do() -> None:
    items = [3, 1, 2]
    assert share(items) is items
    assert distributed.all_gather("mine") == ["mine"]
    assert distributed.broadcast("mine") == "mine"
    assert distributed.from_main(lambda: None) is None
    rows = torch.ones(2, 3)
    assert distributed.gather_rows(rows) is rows
    distributed.barrier()


def test_shares_are_every_nth_item(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "_current", [World(rank, 3)])
        shares.append(list(share(range(8))))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_has_its_gpu(
    monkeypatch: pytest.MonkeyPatch, second_of_two: None, name: str
) -> None:
    _gpus(monkeypatch, 2)
    assert device_of_rank(name) == torch.device("cuda", 1)
    assert device_of_rank("cpu") == torch.device("cpu")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, second_of_two: None) -> None:
    _gpus(monkeypatch, 1)
    with pytest.raises(UserError, match=r"started 2 processes .* sees 1 GPU; .*nproc_per_node 1"):
        device_of_rank("auto")
    _gpus(monkeypatch, 0)
    assert device_of_rank("auto") == torch.device("cpu")


def test_one_gpu_for_all_is_refused(monkeypatch: pytest.MonkeyPatch, second_of_two: None) -> None:
    _gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="'cuda:0', but 2 processes .* expected auto or cuda"):
        device_of_rank("cuda:0")
