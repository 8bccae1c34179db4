"""One optimisation step: which network is trained by which loss, and reproducibility."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.loading import load
from data.records import Batch
from engine.build import build_trainer
from engine.supervision import UpgradeState, frozen_copy
from engine.train_step import StepOutput, _accuracy
from engine.trainer import Trainer
from modeling.privacy_networks import PrivacyNetworks
from modeling.reid_network import ReIDOutput, ReIDPair
from tests.fixtures import tiny

DISCRIMINATOR = {
    "discriminator_anonymized_fake", "discriminator_anonymized_real",
    "discriminator_recovered_fake", "discriminator_recovered_real",
}  # fmt: skip
GENERATOR = {"anonymization", "recovery", "gan_anonymized", "gan_recovered"}
REID = {
    kind: {f"reid_{kind}_{term}" for term in ("cross_entropy", "triplet", "center")}
    for kind in ("raw", "protected")
}
ONLY = ("LOSS.REID", "0", "LOSS.ANONYMIZATION", "0", "LOSS.RECOVERY", "0", "LOSS.GAN", "0")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    tiny.install(monkeypatch)

    def trainer(*overrides: str, output: str = "run") -> Trainer:
        config, *words = tiny.arguments(tmp_path, *overrides, output=output)
        made = build_trainer(load(config.split("=")[1], words))
        made.networks.train()
        return made

    return trainer


def _batch(trainer: Trainer) -> Batch:
    trainer.loader.set_epoch(1)
    return next(iter(trainer.loader))


def _nets(trainer: Trainer) -> PrivacyNetworks:
    assert isinstance(trainer.networks, PrivacyNetworks)
    return trainer.networks


def _values(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def _equal(first: list[Tensor], second: list[Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(first, second, strict=True)]


def _gradients(module: nn.Module) -> float:
    found = [p.grad.abs().max() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(found).max()) if found else 0.0


def _at(trainer: Trainer, moment: str, look: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Call ``look`` just before an optimiser step."""
    step = getattr(trainer.optimizers, moment)

    def looking() -> None:
        look()
        step()

    patch.setattr(trainer.optimizers, moment, looking)


def test_generators_and_discriminators_are_updated_separately(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    nets = _nets(trainer)
    generators = (nets.anonymizer, nets.recovery, nets.reid, trainer.centers)
    start = {"generators": _values(*generators), "discriminators": _values(*nets.discriminators)}
    order: list[str] = []

    def before_discriminators() -> None:
        order.append("discriminators")
        assert all(_gradients(one) == 0 for one in generators)
        assert all(_gradients(one) > 0 for one in nets.discriminators)

    def before_generators() -> None:
        order.append("generators")
        assert all(_equal(start["generators"], _values(*generators)))
        start["discriminators after"] = _values(*nets.discriminators)
        assert not all(_equal(start["discriminators"], start["discriminators after"]))
        assert all(_gradients(one) == 0 for one in nets.discriminators)
        assert all(_gradients(one) > 0 for one in generators)

    _at(trainer, "step_discriminators", before_discriminators, monkeypatch)
    _at(trainer, "step_main", before_generators, monkeypatch)
    trainer.step(_batch(trainer))
    assert order == ["discriminators", "generators"]
    assert all(_equal(start["discriminators after"], _values(*nets.discriminators)))
    assert not any(_equal(_values(*generators)[:1], start["generators"][:1]))
    assert all(p.grad is None for p in trainer.networks.parameters())
    assert all(p.requires_grad for p in nets.discriminators[0].parameters())  # not frozen any more


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("both", {"raw", "protected"}),
        ("joined", {"raw", "protected"}),
        ("origin", {"raw"}),
        ("protected", {"protected"}),
    ],
)
@pytest.mark.parametrize("model", ["GCR", "C"])
def test_output_mode_chooses_the_images(
    make: Callable[..., Trainer], mode: str, kinds: set[str], model: str
) -> None:
    trainer = make("MODEL.OUTPUT_MODE", mode, "MODEL.MODE", model)
    out = trainer.step(_batch(trainer))
    names = set().union(*(REID[kind] for kind in kinds))
    assert set(out.losses) == (names | GENERATOR | DISCRIMINATOR if model == "GCR" else names)
    assert all(not value.requires_grad for value in out.numbers().values())
    assert all(value.shape == () for value in out.numbers().values())
    assert 0 <= float(out.accuracy) <= 1


def test_without_re_id_loss_the_re_id_network_is_neither_run_nor_changed(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("MODEL.OUTPUT_MODE", "none", "MODEL.VAL_R1", "inf")
    nets = _nets(trainer)
    before, generator = copy.deepcopy(nets.reid.state_dict()), _values(nets.anonymizer)
    monkeypatch.setattr(nets.reid, "forward", None)
    out = trainer.step(_batch(trainer))
    assert set(out.losses) == GENERATOR | DISCRIMINATOR
    assert float(out.accuracy) == 0
    assert all(torch.equal(value, before[name]) for name, value in nets.reid.state_dict().items())
    assert not any(_equal(_values(nets.anonymizer)[:1], generator[:1]))


def test_accuracy_is_the_mean_of_both_kinds_of_images() -> None:
    label = torch.tensor([0, 1, 2, 2])

    def output(*classes: int) -> ReIDOutput:
        logits = functional.one_hot(torch.tensor(classes), 4).float()
        return ReIDOutput(logits=logits, feature=logits, embedding=logits)

    both = ReIDPair(reid_raw=output(0, 1, 2, 3), reid_protected=output(0, 2, 1, 1))
    assert float(_accuracy(both, label)) == 0.5
    assert float(_accuracy(replace(both, reid_protected=None), label)) == 0.75


@pytest.mark.parametrize(
    ("loss", "mode", "flows"),
    [
        ("LOSS.RECOVERY", "both", True),  # makes the anonymizer reversible
        ("LOSS.REID", "both", True),  # makes it keep identity
        ("LOSS.REID", "protected", True),
        ("LOSS.REID", "origin", False),
        ("LOSS.ANONYMIZATION", "both", True),
        ("LOSS.GAN", "both", True),
    ],
)
def test_which_losses_train_the_anonymizer(
    make: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    mode: str,
    flows: bool,
) -> None:
    trainer = make(*ONLY, loss, "1", "MODEL.OUTPUT_MODE", mode)
    found: list[float] = []
    _at(
        trainer, "step_main", lambda: found.append(_gradients(_nets(trainer).anonymizer)),
        monkeypatch,
    )  # fmt: skip
    trainer.step(_batch(trainer))
    assert (found[0] > 0) is flows


def test_the_total_is_the_weighted_sum(make: Callable[..., Trainer]) -> None:
    trainer = make()
    out = trainer.step(_batch(trainer))
    losses = {name: float(value) for name, value in out.losses.items()}
    expected = 100 * losses["anonymization"] + 100 * losses["recovery"]
    expected += losses["gan_anonymized"] + losses["gan_recovered"]
    for kind in ("raw", "protected"):
        expected += losses[f"reid_{kind}_cross_entropy"] + losses[f"reid_{kind}_triplet"]
        expected += 5e-4 * losses[f"reid_{kind}_center"]
    assert float(out.total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("in_force", [False, True])
def test_the_target_comes_from_supervision(make: Callable[..., Trainer], in_force: bool) -> None:
    trainer = make()
    nets, batch = _nets(trainer), _batch(trainer)
    teacher = frozen_copy(nets.anonymizer)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
        target = teacher(batch.raw) if in_force else batch.desensitized
        anonymized = frozen_copy(nets.anonymizer).train()(batch.raw)
    trainer.supervision.teacher = teacher
    trainer.supervision.state = UpgradeState(1, 0.5, 1, in_force=in_force)
    before = _values(teacher)
    out = trainer.step(batch)
    expected = float(functional.l1_loss(anonymized, target))
    assert float(out.losses["anonymization"]) == pytest.approx(expected, rel=1e-5)
    assert all(_equal(before, _values(teacher)))
    assert not teacher.training


def test_a_moving_average_follows_each_step(make: Callable[..., Trainer]) -> None:
    trainer = make("MODEL.TEACHER_EMA", "0.75")
    nets, batch = _nets(trainer), _batch(trainer)
    teacher = trainer.supervision.teacher = frozen_copy(nets.anonymizer)
    trainer.supervision.state = UpgradeState(1, 0.5, 1, in_force=True)
    before = _values(teacher)
    trainer.step(batch)
    for old, new, moved in zip(before, _values(nets.anonymizer), _values(teacher), strict=True):
        torch.testing.assert_close(moved, 0.75 * old + 0.25 * new)
    assert not all(_equal(before, _values(teacher)))


@pytest.mark.parametrize("model", ["GCR", "C"])
def test_two_seeded_runs_are_identical(make: Callable[..., Trainer], model: str) -> None:
    outputs: list[StepOutput] = []
    ends: list[list[Tensor]] = []
    for number in range(2):
        torch.manual_seed(number)  # the state of the global generator must not matter
        trainer = make("MODEL.MODE", model, output=f"run{number}")
        trainer.loader.set_epoch(1)
        outputs += [trainer.step(batch) for batch, _ in zip(trainer.loader, range(3), strict=False)]
        ends.append(_values(trainer.networks, trainer.centers))
    for first, second in zip(outputs[:3], outputs[3:], strict=True):
        tiny.assert_equal(first.numbers(), second.numbers())
    assert all(_equal(*ends))


def test_another_seed_is_another_run(make: Callable[..., Trainer]) -> None:
    trainers = [make("SOLVER.SEED", seed, output=f"run{seed}") for seed in ("1", "2")]
    totals = [float(trainer.step(_batch(trainer)).total) for trainer in trainers]
    assert totals[0] != totals[1]


def test_the_baseline_trains_the_reid_network_alone(make: Callable[..., Trainer]) -> None:
    trainer = make("MODEL.MODE", "C")
    before = _values(trainer.networks)
    assert trainer.step.anonymizer is None
    trainer.step(_batch(trainer))
    assert trainer.optimizers.discriminators == []
    assert len(trainer.optimizers.main) == 1
    assert not all(_equal(before, _values(trainer.networks)))
