"""The device of each process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.distributed.processes import device_of_rank, running_as
from utils.errors import UserError
from utils.world import World


@pytest.fixture
def second_of_two() -> Iterator[None]:
    with running_as(World(3, 4, 1, 2)):
        yield


def _gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_gets_its_own_gpu(
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
