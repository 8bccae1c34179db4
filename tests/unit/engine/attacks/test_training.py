"""Attackers learn what can be learnt, and keep what held-out public persons liked best."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.attacks import build, training
from engine.attacks.attack import AttackContext
from engine.attacks.measures import FAILS, HOLDS
from engine.attacks.network_attacks import PENALTIES, LinearMap, Restorer, budgets, fit_linear
from engine.attacks.suite import ATTACKS
from engine.attacks.training import HeldOut, TrainingSetup, train_recovery, train_reid
from engine.scoring.image_quality import QualityAccumulator
from layers.losses import GAN_LOSSES, weighted_regularized_triplet_loss
from modeling.objectives import Objectives, term_weights
from modeling.reid_network import ReIDOutput
from tests.fixtures.attack_scene import PIXELS, image_set, install_small_restorer, make_scene


def bench(steps: int, seed: int = 1) -> TrainingSetup:
    return TrainingSetup(torch.device("cpu"), contextlib.nullcontext, PIXELS, 16, steps, seed)


class PerPixel(nn.Module):
    """One 1 x 1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.layer(image)
        return out


def test_recovery_learns_to_undo_a_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RECOVERY_RATE", 0.03)  # for a layer far from its goal
    raw = PIXELS.normalize(image_set(1, 8, 3, seed=1).raw)
    held_out = PIXELS.normalize(image_set(20, 4, 3, seed=2).raw)
    trained = train_recovery(
        PerPixel, -raw, raw, lambda x: x, (-held_out, held_out), bench(200), "negative"
    )
    assert trained.validation > 30
    quality = QualityAccumulator()
    quality.update(PIXELS.denormalize(held_out), bench(1).pictures(trained.network, -held_out))
    assert quality.result().psnr_db > 30
    assert not trained.network.training


def test_the_rate_rises_to_its_value_and_falls_to_nothing() -> None:
    network, rates = PerPixel(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=99.0)

    def update(step: int) -> Tensor:
        rates.append(optimizer.param_groups[0]["lr"])
        return network.layer.weight.square().sum()

    training._train(network, optimizer, 0.5, update, lambda: 1.0, bench(100), "rates")
    top = rates.index(max(rates))
    assert len(rates) == 100
    assert max(rates) == pytest.approx(0.5)
    assert 0 < top <= 10
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.005
    assert rates[(100 + top) // 2] == pytest.approx(0.25, abs=0.01)  # half a cosine


def test_the_weights_of_the_best_validation_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = PIXELS.normalize(image_set(1, 4, 2, seed=1).raw)
    scores = iter([3.0, 9.0, 5.0, 7.0, 1.0, 2.0, 4.0, 6.0])
    seen: list[dict[str, Tensor]] = []
    networks: list[PerPixel] = []

    def make() -> PerPixel:
        networks.append(PerPixel())
        return networks[-1]

    def quality(truth: Tensor, images: Tensor) -> tuple[Any, Any]:
        seen.append({k: v.clone() for k, v in networks[0].state_dict().items()})
        score = torch.tensor([next(scores)])
        return score, score

    monkeypatch.setattr(training, "quality", quality)
    trained = train_recovery(make, raw, -raw, lambda x: x, (raw, raw), bench(16), "kept")
    assert (trained.best_step, trained.validation) == (4, 9.0)
    kept = trained.network.state_dict()
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[-1][name]) for name in kept)


def test_training_repeats_itself_and_seeds_differ() -> None:
    raw = PIXELS.normalize(image_set(1, 4, 2, seed=1).raw)

    def weights(seed: int) -> Tensor:
        arguments = (PerPixel, raw, raw, lambda x: x, (raw, raw), bench(8, seed), "again")
        return train_recovery(*arguments).network.state_dict()["layer.weight"]  # type: ignore[arg-type]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


class LinearReID(nn.Module):
    """Mean colour and one linear layer."""

    def __init__(self, persons: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8, bias=False)
        nn.init.normal_(self.layer.weight, std=0.02)
        self.classifier = nn.Linear(8, persons, bias=False)

    def embed(self, image: Tensor) -> Tensor:
        out: Tensor = self.layer(image.mean((2, 3)))
        return out

    def forward(self, image: Tensor) -> ReIDOutput:
        feature = self.embed(image)
        return ReIDOutput(self.classifier(feature), feature, feature)


def colours(persons: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Green identifies persons; red identifies cameras and is ten times as bright."""
    generator = torch.Generator().manual_seed(seed)
    pids = torch.arange(persons).repeat_interleave(8)
    camids = torch.arange(8).repeat(persons) // 4
    images = 0.02 * torch.randn(len(pids), 3, 4, 4, generator=generator)
    images[:, 0] += 4.0 * torch.randn(len(pids), 1, 1, generator=generator)
    images[:, 1] += torch.linspace(-1, 1, persons)[pids][:, None, None]
    images[:, 2] += torch.linspace(1, -1, persons).roll(3)[pids][:, None, None]
    return images, pids, camids


def test_reid_learns_what_tells_persons_apart() -> None:
    objectives = Objectives(
        triplet=weighted_regularized_triplet_loss, label_smoothing=0.1, centers=None,
        gan=GAN_LOSSES["vanilla"],
        weights=term_weights(lambda key: float(key == "LOSS.REID")),
    )  # fmt: skip
    images, pids, _ = colours(8, 1)
    held_out = HeldOut(*colours(6, 2))
    torch.manual_seed(1)
    network: Any = LinearReID(8)
    before = training._held_out_map(network.embed(held_out.images), held_out, cross_camera=True)
    rate = training.REID_RATE
    trained = train_reid(network, images, pids, held_out, objectives, bench(200), "colours")
    assert rate == training.REID_RATE
    assert trained.validation > before + 0.1


def test_budgets_of_the_curve() -> None:
    assert budgets(4096) == [256, 1024, 4096]
    assert budgets(20) == [8, 8, 20]


def test_the_model_attack_sees_through_a_blur_and_not_through_aead() -> None:
    scene = make_scene(steps=16)
    blurred = ATTACKS["model"].run(scene, "anonymized").result
    assert blurred.verdict == FAILS
    assert [point.x for point in blurred.curve] == budgets(len(scene.public))
    assert {"psnr", "ssim", "recovered_rank1"} <= {m.name for m in blurred.measures}
    assert ATTACKS["model"].run(scene, "aead").result.verdict == HOLDS


def test_a_network_finds_persons_on_raw_and_not_on_aead() -> None:
    scene = make_scene()
    for name in ("reid-authorised", "reid-public"):
        assert ATTACKS[name].run(scene, "raw").result.verdict == FAILS
        assert ATTACKS[name].run(scene, "aead").result.verdict == HOLDS
    assert "reid-public" in ATTACKS["reid-tuned"].reason_against("raw")


@pytest.mark.parametrize("size", [(32, 16), (30, 18), (7, 5)])
def test_a_new_restorer_changes_little_and_keeps_any_size(size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    restored = Restorer()(image).detach()
    assert restored.shape == image.shape
    assert 0 < float((restored - image).abs().mean()) < 1


def test_the_restorer_sees_through_a_blur_and_not_through_aead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_small_restorer(monkeypatch)
    scene = make_scene(steps=12)
    blurred = ATTACKS["model-restorer"].run(scene, "anonymized").result
    assert blurred.verdict == FAILS
    assert not blurred.curve
    assert ATTACKS["model-restorer"].run(scene, "aead").result.verdict == HOLDS


def test_the_linear_map_is_ridge_regression() -> None:
    generator = torch.Generator().manual_seed(3)
    stored, raw, new = (torch.randn(n, 3, 4, 2, generator=generator) for n in (40, 40, 5))
    linear = LinearMap(stored, raw)
    for penalty in (1e-4, 0.1):
        linear.set_penalty(penalty)
        rows, targets = ((x - x.mean(0)).flatten(1).double() for x in (stored, raw))
        gram = rows.T @ rows  # 24 x 24, of full rank: all components are used
        ridge = penalty * torch.linalg.eigvalsh(gram).mean() * torch.eye(len(gram))
        weights = torch.linalg.solve(gram + ridge, rows.T @ targets)
        expected = (new - stored.mean(0)).flatten(1).double() @ weights
        estimate = (linear(new) - raw.mean(0)).flatten(1)
        torch.testing.assert_close(estimate, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_linear_map_undoes_a_linear_change_and_keeps_the_best_penalty() -> None:
    raw = PIXELS.normalize(image_set(1, 40, 3, seed=1).raw)
    held_out = PIXELS.normalize(image_set(90, 4, 3, seed=2).raw)
    linear, penalty, psnr_db = fit_linear(-raw, raw, lambda x: x, (-held_out, held_out), bench(1))
    assert penalty == min(PENALTIES)
    assert psnr_db > 40
    assert not linear.training
    noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(1))
    _, penalty, noisy_db = fit_linear(noise, raw, lambda x: x, (held_out, held_out), bench(1))
    assert penalty > min(PENALTIES)
    assert noisy_db < psnr_db


def test_the_linear_attack_sees_through_a_blur_and_not_through_aead() -> None:
    scene = make_scene()
    blurred = ATTACKS["model-linear"].run(scene, "anonymized").result
    assert blurred.verdict == FAILS
    assert blurred.sentence.startswith("Trained on 60 public images, a linear regression")
    assert blurred.details["updates"] == 0
    assert ATTACKS["model-linear"].run(scene, "aead").result.verdict == HOLDS


def test_an_attacker_trains_re_id_although_the_owner_did_not(
    make_cfg: Callable[..., CfgNode],
) -> None:
    objectives = build._factories(make_cfg("LOSS.REID", "0.0"), "none").objectives(3, 16)
    assert objectives.weights["reid_raw_cross_entropy"] == 1


def test_the_start_of_an_attackers_network_depends_on_the_seed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AttackContext, "_fit", lambda self, network, level, title: network)

    def start(seed: int) -> Tensor:
        torch.rand(seed)  # an earlier attack has drawn numbers
        context = make_scene(seed)
        context._public_reid = None
        context.factories = replace(context.factories, reid=lambda persons: nn.Linear(2, persons))
        weight: Tensor = context.public_reid().weight
        return weight

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
