from __future__ import annotations

import copy
import logging
import re
import shutil

import pytest
import torch
from torch import Tensor, nn

from utils import compiling
from utils.compiling import compile_in_place, resolve_compile, uncompiled
from utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that lacks nothing."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", CPU, False), ("on", CPU, True), ("off", CPU, False),
        ("auto", GPU, True), ("on", GPU, True), ("off", GPU, False),
    ],
)  # fmt: skip
def test_auto_compiles_on_gpus(
    complete: pytest.MonkeyPatch, name: str, device: torch.device, expected: bool
) -> None:
    assert resolve_compile(name, device) is expected


@pytest.mark.parametrize(
    ("lacks", "device", "words"),
    [("compiler", CPU, r"no C\+\+ compiler"), ("compiler", GPU, r"no C\+\+ compiler"),
     ("triton", GPU, "triton is not installed"), ("capability", GPU, "older")],
)  # fmt: skip
def test_what_is_missing_is_one_line(
    complete: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lacks: str,
    device: torch.device,
    words: str,
) -> None:
    if lacks == "compiler":
        complete.setattr(shutil, "which", lambda name: None)
    elif lacks == "triton":
        complete.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    else:
        complete.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    logging.getLogger("reid_baseline").propagate = True
    with caplog.at_level("WARNING"):
        assert not resolve_compile("on", device)
    (line,) = {record.getMessage() for record in caplog.records}
    assert re.search(words, line)


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(UserError, match=r"RUNTIME\.COMPILE is 'maybe'; expected one of auto"):
        resolve_compile("maybe", CPU)


class Network(nn.Module):
    """Torch's own containers would not do: 2.4 compiles only what is written outside of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.layer(image)
        return out


def test_names_stay_and_copies_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        calls.append("compiled")
        return graph

    compile_itself = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_itself(self, backend=backend))
    network = Network()
    names = list(network.state_dict())
    compile_in_place([network])
    assert list(network.state_dict()) == names
    images = torch.ones(1, 2)
    expected = copy.deepcopy(network)(images)
    with uncompiled():
        network(images)
    assert not calls or not hasattr(torch.compiler, "set_stance")
    assert torch.equal(network(images), expected)
    assert calls
