from __future__ import annotations

import copy
import re
import shutil

import pytest
import torch
from torch import nn

from utils import device as device_module
from utils.device import compile_in_place, resolve_compile, uncompiled

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Network(nn.Module):
    """A network that is not one of torch's modules, which torch 2.10 does not compile alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(images)
        return out


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with everything that compilation needs."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(device_module.Path, "is_file", lambda self: True)
    monkeypatch.setattr(torch, "compile", lambda network: network)
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


def test_auto_does_not_compile_short_trainings(
    complete: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert not resolve_compile("auto", GPU, worth_it=False)
    assert "takes minutes" in caplog.text
    assert resolve_compile("on", GPU, worth_it=False)


def _raise(network: nn.Module) -> None:
    raise RuntimeError("torch.compile is not supported on Python 3.99\nand more")


@pytest.mark.parametrize(
    ("lacks", "device", "words"),
    [("compiler", CPU, r"no C\+\+ compiler"), ("compiler", GPU, r"no C\+\+ compiler"),
     ("headers", CPU, r"Python\.h"), ("dynamo", CPU, "not supported on Python 3.99"),
     ("triton", GPU, "triton is not installed"), ("capability", GPU, "older")],
)  # fmt: skip
def test_the_missing_part_is_named_in_one_line(
    complete: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lacks: str,
    device: torch.device,
    words: str,
) -> None:
    if lacks == "compiler":
        complete.setattr(shutil, "which", lambda name: None)
    elif lacks == "headers":
        complete.setattr(device_module.Path, "is_file", lambda self: self.name != "Python.h")
    elif lacks == "dynamo":
        complete.setattr(torch, "compile", _raise)
    elif lacks == "triton":
        complete.setattr(device_module.importlib.util, "find_spec", lambda name: None)
    else:
        complete.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with caplog.at_level("WARNING"):
        assert not resolve_compile("on", device)
    (line,) = caplog.messages
    assert re.search(words, line)


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
    assert not calls
    assert torch.equal(network(images), expected)
    assert calls


@pytest.mark.parametrize("forgiving", [False, True])
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, forgiving: bool) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        raise OSError("no room for kernels")

    import torch._dynamo  # noqa: PLC0415 - takes seconds

    compile_itself = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_itself(self, backend=backend))
    network = Network()
    images = torch.ones(1, 2)
    expected = copy.deepcopy(network)(images)
    with torch._dynamo.config.patch(suppress_errors=False):  # restored afterwards
        compile_in_place([network], forgiving=forgiving)
        if forgiving:
            assert torch.equal(network(images), expected)
        else:
            with pytest.raises(Exception, match="no room for kernels"):
                network(images)
