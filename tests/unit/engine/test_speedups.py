"""Speed options change the numbers of a training by rounding only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.loading import load
from engine import model
from engine.build import build_trainer
from engine.evaluation import Evaluator, Extraction
from engine.report import EvalReport
from engine.trainer import Trainer
from tests.fixtures import tiny
from tests.fixtures.curves import Curve, curve_of, worst_difference
from tools.benchmarks.step import make_step
from utils import device as device_module
from utils.world import World

PLAIN = ("RUNTIME.CHANNELS_LAST", "False", "RUNTIME.COMPILE", "off")
Curves = Callable[..., Curve]


@pytest.fixture
def make_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    tiny.install(monkeypatch)
    folders = (f"run{number}" for number in itertools.count())

    def make(*overrides: str) -> Trainer:
        options = ("SOLVER.WARMUP_ITERS", "0", *overrides)
        config, *words = tiny.arguments(tmp_path, *options, output=next(folders))
        return build_trainer(load(config.split("=")[1], words))

    return make


@pytest.fixture
def curves(make_trainer: Callable[..., Trainer]) -> Curves:
    return lambda *overrides: curve_of(make_trainer(*overrides))


def test_bfloat16_follows_the_float32_curve(
    curves: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 % at every step, loss by loss; rounding to 8 bits is 0.4 % a number."""
    monkeypatch.setattr("engine.model.resolve_precision", lambda name, device: torch.float32)
    plain = curves(*PLAIN)
    monkeypatch.setattr("engine.model.resolve_precision", lambda name, device: torch.bfloat16)
    fast = curves()
    assert 1e-5 < worst_difference(plain, fast) < 0.05  # not 0: the option has an effect
    assert all(loss == loss for losses in fast for loss in losses.values())


def test_float32_equals_the_plain_loop_to_rounding(curves: Curves) -> None:
    assert worst_difference(curves(*PLAIN), curves()) < 1e-4


def test_recomputed_activations_train_the_same(curves: Curves) -> None:
    assert worst_difference(curves(), curves("SOLVER.GRAD_CHECKPOINT", "True")) < 1e-6


def test_compiled_networks_train_the_same_with_few_graphs(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced completely, with the discriminators frozen and not.

    There is a graph for each network and set of gradients; torch gives up at eight of one function.
    The backend, which changes nothing, saves time.
    """
    compile_itself = nn.Module.compile
    compiled: list[str] = []
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def trace(self: nn.Module) -> None:
        compiled.append(type(self).__name__)
        compile_itself(self, backend=backend, fullgraph=True)

    plain = curve_of(make_trainer())
    monkeypatch.setattr(nn.Module, "compile", trace)
    monkeypatch.setattr(device_module, "_missing", lambda device: "")
    torch.compiler.reset()
    trainer = make_trainer("RUNTIME.COMPILE", "on", *tiny.PERMISSIVE)
    networks = ["UNet", "UNet", "PatchDiscriminator", "PatchDiscriminator", "TinyBackbone"]
    assert compiled == [*networks, "AveragePooling"]
    assert worst_difference(plain, curve_of(trainer)) < 1e-5
    # Raw and anonymized images into C, into a U-Net; discriminators trained and frozen; the
    # pooling of C.
    count = len(graphs)
    assert count <= 8
    trainer.fit()  # with validations, and a teacher from epoch 2
    assert trainer.supervision.state.in_force
    assert len(graphs) == count


@pytest.mark.slow
def test_compiled_kernels_train_the_same(curves: Curves) -> None:
    if device_module._missing(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    assert worst_difference(curves(*PLAIN), curves("RUNTIME.COMPILE", "on")) < 1e-3


class _Layouts(TorchDispatchMode):
    """Records inputs of convolutions and batch norms that are not dense channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: set[str] = set()
        self.others: list[tuple[str, int, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name.startswith(("convolution", "native_batch_norm")):
            self.recorded.add(name)
            for place, value in enumerate(args[:2]):
                if isinstance(value, Tensor) and value.dim() == 4 and not _channels_last(value):
                    self.others.append((name, place, tuple(value.shape)))
        return function(*args, **(kwargs or {}))


def _channels_last(images: Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["GCR", "C"])
def test_convolutions_and_norms_get_dense_channels_last_maps(mode: str) -> None:
    """Forward and backward: a batch norm takes thirty times as long otherwise on a CPU."""
    words = ("INPUT.IMG_SIZE", "(64, 32)", "UNET.NUM_DOWNS", "5", "MODEL.NGF", "4",
             "MODEL.NDF", "4", "RUNTIME.CHANNELS_LAST", "True", "MODEL.MODE", mode)  # fmt: skip
    work = make_step(("configs/demo.yml", words, "cpu"), 8, 1)
    with _Layouts() as layouts:
        work()
    # Gradients of images (three channels), sums over many losses, may have another layout.
    others = [one for one in layouts.others if one[2][1] > 3]
    assert not others
    assert layouts.recorded >= {"convolution_backward", "native_batch_norm_backward"}


@pytest.mark.parametrize(("epochs", "compiled"), [("1000", False), ("1000000", True)])
def test_auto_compiles_long_trainings(
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    epochs: str,
    compiled: bool,
) -> None:
    """The set has 48 images of 32 x 32: a million of the published size are 670,000 epochs."""
    recorded: list[bool] = []

    def resolve(name: str, device: torch.device, *, worth_it: bool) -> bool:
        assert name == "auto"
        recorded.append(
            device_module.resolve_compile(name, torch.device("cuda"), worth_it=worth_it)
        )
        return False

    monkeypatch.setattr(device_module, "_missing", lambda device: "")
    monkeypatch.setattr(model, "resolve_compile", resolve)
    trainer = make_trainer("SOLVER.MAX_EPOCHS", epochs)
    assert trainer.loader.num_images == 48
    assert recorded == [compiled]


@pytest.mark.parametrize("choice", ["True", "False"])
def test_cudnn_tries_its_kernels_in_trainings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    tiny.install(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    settings: dict[str, bool] = {}
    fit, extract = Trainer.fit, Evaluator.extract

    def fitting(self: Trainer) -> EvalReport | None:
        settings["training"] = torch.backends.cudnn.benchmark
        return fit(self)

    def extracting(self: Evaluator) -> Extraction:
        settings["evaluation"] = torch.backends.cudnn.benchmark
        return extract(self)

    monkeypatch.setattr(Trainer, "fit", fitting)
    monkeypatch.setattr(Evaluator, "extract", extracting)
    options = ("RUNTIME.CUDNN_BENCHMARK", choice, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    tiny.run(tmp_path, *options)
    assert settings == {"training": choice == "True", "evaluation": False}


def test_several_processes_are_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every batch norm communicates there."""
    tiny.install(monkeypatch)
    monkeypatch.setattr(device_module, "_missing", lambda device: "")
    monkeypatch.setattr(model, "compile_in_place", lambda networks: pytest.fail("compiled"))
    config, *words = tiny.arguments(tmp_path, "RUNTIME.COMPILE", "on")
    cfg = load(config.split("=")[1], words)
    made = model.build_model(cfg, 3)
    monkeypatch.setattr(model, "world", lambda: World(1, 2))
    with caplog.at_level("INFO"):
        model.compile_model(cfg, made)
    assert "Networks are not compiled (RUNTIME.COMPILE on)" in caplog.text
