"""A training goes on as itself or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.checkpoint import CheckpointError, differences, run_differences
from engine.run_folder import RunFolder

INFO: dict[str, Any] = {
    "architecture": {"MODEL.NAME": "resnet18", "INPUT.IMG_SIZE": [32, 32]},
    "desensitizer": {"type": "mosaic", "radius": 8.0},
    "dataset": "market1501_val",
    "pid_of_label": [2, 7, 11],
}


def test_what_differs() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ["b 2 (now 3)"]
    assert differences({"a": 1}, {"a": 2}, leave_out=("a",)) == []
    assert differences({}, {"a": 2}) == []  # an older file that did not record it
    assert differences({"gone": 1}, {}) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architecture": {"MODEL.NAME": "resnet50"}}, "MODEL.NAME 'resnet18' (now 'resnet50')"),
        (
            {"desensitizer": {"type": "blur", "radius": 8.0}},
            "INPUT.TYPE 'mosaic' (now 'blur')",
        ),
        ({"desensitizer": {"type": "mosaic", "radius": 4.0}}, "INPUT.RADIUS 8.0 (now 4.0)"),
        (
            {"dataset": "cuhk03_val", "pid_of_label": [1, 2]},
            "3 identities of market1501_val (now 2 others, of cuhk03_val)",
        ),
    ],
)
def test_another_training_is_not_gone_on_with(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    assert run_differences(INFO, INFO | change) == [told]
    network = nn.Linear(2, 2)
    RunFolder(tmp_path, {"C": network}, INFO).save_latest(3, {"step": 1})
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.add_(1.0)
    with pytest.raises(CheckpointError, match="was trained with") as error:
        RunFolder(tmp_path, {"C": network}, INFO | change).load_latest()
    assert told in str(error.value)
    assert torch.equal(network.weight, before + 1.0)  # nothing was loaded


def test_the_same_people_may_have_moved(tmp_path: Path) -> None:
    assert run_differences(INFO, INFO | {"dataset": "folder:/elsewhere"}) == []
    assert run_differences({}, INFO) == []
    network = nn.Linear(2, 2)
    RunFolder(tmp_path, {"C": network}, INFO).save_latest(3, {"step": 1})
    assert RunFolder(tmp_path, {"C": network}, INFO).load_latest() == (3, {"step": 1})
