"""Two processes, each with half the batch, have the gradients of one with the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.loading import load
from data.records import Batch
from engine.build import build_trainer
from engine.distributed.processes import is_main, joined, world
from engine.supervision import UpgradeState, frozen_copy
from engine.trainer import Trainer
from layers.blocks import NonLocalBlock
from layers.collectives import CPUSyncBatchNorm, synchronize_norms
from modeling.privacy_networks import PrivacyNetworks
from tests.fixtures import ranks, tiny
from tests.fixtures.paths import ROOT

CASES: dict[str, tuple[str, ...]] = {
    "evaluation-mode": (),
    "synchronised": (),
    "teacher": (),
    "batch-hard": ("MODEL.WEIGHT_REGULARIZED_TRIPLET", "off", "MODEL.GAN_MODE", "lsgan"),
    "protected-only": ("MODEL.OUTPUT_MODE", "protected", "MODEL.CENTER_LOSS", "off"),
    "pairs": ("LOSS.ALIGNMENT", "2", "LOSS.CONSISTENCY", "2", "LOSS.CROSS_TRIPLET", "0.5"),
    "noise": ("INPUT.TYPE", "noise", "INPUT.RADIUS", "0.3"),
    "baseline": ("MODEL.MODE", "C"),
}
SETTING = ("SOLVER.IMS_PER_BATCH", "8", "SOLVER.CENTER_LOSS_WEIGHT", "0.05")
Tensors = dict[str, dict[str, Tensor]]


class NonLocalBackbone(tiny.TinyBackbone):
    """The tiny backbone with a non-local block, which computes its batch norm itself."""

    def __init__(self, *, last_stride: int, stem_relu: bool) -> None:
        super().__init__(last_stride=last_stride, stem_relu=stem_relu)
        self.layers.append(NonLocalBlock(self.out_channels))


def gradients(folder: Path, case: str) -> dict[str, Tensor]:
    """Gradients, losses and running statistics of the second step, weights as at the start.

    A first step shows whether state that it leaves, such as gradients, changes the second one.
    """
    places = ("OUTPUT_DIR", str(folder / case), "DATASETS.ROOT_DIR", str(folder / "sets"))
    words = [*tiny.TINY, *SETTING, *CASES[case], *places]
    with pytest.MonkeyPatch.context() as patch:
        # the bounds on rounding errors are those of drawn people
        tiny.install(patch, NonLocalBackbone, draw_people=True)
        return _gradients(build_trainer(load(ROOT / "configs/demo.yml", words)), case)


def _gradients(trainer: Trainer, case: str) -> dict[str, Tensor]:
    nets = trainer.networks
    _stir(nets)
    nets.train(case != "evaluation-mode")
    if case == "teacher":
        assert isinstance(nets, PrivacyNetworks)
        trainer.supervision.teacher = frozen_copy(nets.anonymizer)
        trainer.supervision.state = UpgradeState(1, 0.5, 1, in_force=True)
    found: dict[str, Tensor] = {}
    optimizers = trainer.optimizers

    def keep(phase: str) -> None:
        for letter, module in {**nets.official_networks, "centers": trainer.centers}.items():
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    found[f"{letter}.{name} of {phase}"] = parameter.grad.clone()
        optimizers.zero_grad()

    optimizers.step_discriminators = lambda: keep("discriminators")
    optimizers.step_main = lambda: keep("main")
    for batch in _first_batches(trainer):
        found.clear()
        output = trainer.step(batch)
    found |= {f"loss/{name}": value for name, value in output.numbers().items()}
    return found | {f"state/{n}": b.clone().float() for n, b in nets.named_buffers()}


def _stir(nets: nn.Module) -> None:
    """Change all start values: non-local blocks start as the identity."""
    generator = torch.Generator().manual_seed(5)
    for parameter in nets.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.05 * noise
    for name, buffer in nets.named_buffers():
        if "running" in name:
            buffer += torch.rand(buffer.shape, generator=generator)


def _first_batches(trainer: Trainer) -> list[Batch]:
    trainer.loader.set_epoch(1)
    return list(islice(trainer.loader, 2))


def in_ranks(folder: Path) -> int:
    with joined():
        for case in CASES:
            found = gradients(folder, case)
            if is_main():
                torch.save(found, folder / f"{case}.pt")
            # every rank has the same gradients, losses and statistics, to the last bit
            torch.save(found, folder / f"{case}.{world().rank}.pt")
    return 0


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Tensors]]:
    folder = tmp_path_factory.mktemp("two")
    ranks.finish(ranks.start(in_ranks, folder, folder=folder), folder)

    def of(case: str) -> Tensors:
        two, other = (torch.load(folder / f"{case}.{rank}.pt") for rank in (0, 1))
        return {"two": two, "other": other, "one": gradients(folder, case)}

    yield of


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_batch(found: Callable[[str], Tensors], case: str) -> None:
    results = found(case)
    one, two, other = results["one"], results["two"], results["other"]
    assert set(one) == set(two) == set(other)
    networks = ("C",) if case == "baseline" else ("G", "G_R", "C", "D1", "D2")
    for network in networks:
        phase = "discriminators" if network.startswith("D") else "main"
        names = [name for name in one if name.startswith(f"{network}.")]
        assert names
        assert all(name.endswith(f" of {phase}") for name in names)
    largest = {key: _largest(one, key) for key in {name.split(".")[0] for name in one}}
    for name, value in one.items():
        assert torch.equal(two[name], other[name]), name
        # 1e-5 of the network's largest: some gradients are only rounding errors
        scale = 1e-4 * value.abs().max() + 1e-5 * largest[name.split(".")[0]]
        assert (two[name] - value).abs().max() <= scale, name


def _largest(values: dict[str, Tensor], key: str) -> Tensor:
    mine = [value for name, value in values.items() if name.split(".")[0] == key]
    return torch.stack([value.abs().max() for value in mine]).max()


def test_centres_learn(found: Callable[[str], Tensors]) -> None:
    assert found("synchronised")["two"]["centers.centers of main"].abs().max() > 0


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.BatchNorm1d(4)])
def test_a_norm_keeps_its_parameters_keys_and_evaluation(layer: nn.Module) -> None:
    net = nn.Sequential(layer)
    before = dict(net.named_parameters())
    keys = list(net.state_dict())
    images = torch.randn((2, 4, 3, 3) if isinstance(layer, nn.BatchNorm2d) else (2, 4))
    expected = net.eval()(images)
    synchronize_norms(net, torch.device("cpu"))
    assert isinstance(net[0], CPUSyncBatchNorm)
    assert list(net.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
    assert torch.equal(net.eval()(images), expected)


def test_on_cuda_a_norm_becomes_torchs_own() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), NonLocalBlock(4))
    before, keys = dict(net.named_parameters()), list(net.state_dict())
    synchronize_norms(net, torch.device("cuda"))
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [type(norm) for norm in norms] == [nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert list(net.state_dict()) == keys
    assert all(parameter is before[name] for name, parameter in net.named_parameters())
