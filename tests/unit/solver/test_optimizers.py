"""Optimisers: their settings, their groups, and their state over a resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.optim import Adam

from layers.losses import CenterLoss
from solver.optimizers import Optimizers, build_optimizers, set_learning_rate
from utils.errors import UserError

if TYPE_CHECKING:
    from yacs.config import CfgNode

    MakeCfg = Callable[..., CfgNode]


class Nets:
    """A linear layer under each letter."""

    def __init__(self, letters: tuple[str, ...] = ("G", "G_R", "C", "D1", "D2")) -> None:
        torch.manual_seed(0)
        self.official_networks = {letter: nn.Linear(2, 2) for letter in letters}

    def backward(self) -> None:
        for network in self.official_networks.values():
            network(torch.ones(1, 2)).square().sum().backward()


def weights(nets: Nets) -> dict[str, torch.Tensor]:
    return {letter: net.weight.detach().clone() for letter, net in nets.official_networks.items()}


def build(
    make_cfg: MakeCfg, nets: Nets, centers: nn.Module | None = None, *overrides: str
) -> Optimizers:
    return build_optimizers(make_cfg(*overrides), nets.official_networks, centers)


def test_each_network_has_the_adam_of_the_method(make_cfg: MakeCfg) -> None:
    optimizers = build(make_cfg, Nets(), CenterLoss(2, 2))
    groups = [optimizer.param_groups[0] for optimizer in optimizers.main]
    assert [group["betas"] for group in groups] == [(0.5, 0.999), (0.5, 0.999), (0.9, 0.999)]
    groups += [optimizer.param_groups[0] for optimizer in optimizers.discriminators]
    assert [group["betas"] for group in groups[3:]] == [(0.5, 0.999)] * 2
    assert {group["weight_decay"] for group in groups} == {5e-4}
    assert optimizers.centers is not None
    assert optimizers.centers.param_groups[0]["lr"] == 0.5
    assert optimizers.centers.param_groups[0]["weight_decay"] == 0


def test_parameters_that_are_not_trained_are_left_out(make_cfg: MakeCfg) -> None:
    nets = Nets(("C",))
    nets.official_networks["C"].bias.requires_grad_(False)
    nets.official_networks["C"].bias.data.fill_(3.0)
    optimizers = build(make_cfg, nets)
    nets.backward()
    optimizers.step_main()
    assert (nets.official_networks["C"].bias == 3.0).all()  # no decay either


def test_groups_are_stepped_separately_and_delete_their_gradients(make_cfg: MakeCfg) -> None:
    nets = Nets()
    optimizers = build(make_cfg, nets)
    start = weights(nets)
    nets.backward()

    optimizers.step_discriminators()
    moved = {letter for letter, weight in weights(nets).items() if (weight != start[letter]).any()}
    assert moved == {"D1", "D2"}
    assert nets.official_networks["D1"].weight.grad is None
    assert nets.official_networks["G"].weight.grad is not None

    optimizers.step_main()
    moved = {letter for letter, weight in weights(nets).items() if (weight != start[letter]).any()}
    assert moved == {"G", "G_R", "C", "D1", "D2"}
    assert nets.official_networks["G"].weight.grad is None

    nets.backward()
    optimizers.zero_grad()
    assert all(net.weight.grad is None for net in nets.official_networks.values())


@pytest.mark.parametrize("weight", [5e-4, 1.0])
def test_the_rate_of_the_centers_does_not_depend_on_the_loss_weight(
    make_cfg: MakeCfg, weight: float
) -> None:
    centers = CenterLoss(3, 2)
    start = centers.centers.detach().clone()
    optimizers = build(make_cfg, Nets(), centers, "SOLVER.CENTER_LOSS_WEIGHT", str(weight))
    features, labels = torch.ones(2, 2), torch.tensor([0, 2])
    (weight * centers(features, labels)).backward()
    optimizers.step_main()

    # gradient of the mean over 2 of |x - c|^2 is (c - x), and the rate .5
    expected = start.clone()
    expected[[0, 2]] -= 0.5 * (start[[0, 2]] - 1)
    torch.testing.assert_close(centers.centers.detach(), expected)


def test_the_schedule_moves_all_but_the_centers(make_cfg: MakeCfg) -> None:
    optimizers = build(
        make_cfg, Nets(), CenterLoss(2, 2),
        "SOLVER.BASE_LR", "1.0", "SOLVER.STEPS", "(4,)",
        "SOLVER.WARMUP_FACTOR", "0.5", "SOLVER.WARMUP_ITERS", "2",
    )  # fmt: skip
    adams = optimizers.main + optimizers.discriminators
    assert {optimizer.param_groups[0]["lr"] for optimizer in adams} == {0.75}
    assert set_learning_rate(optimizers, 2) == 1.0
    assert set_learning_rate(optimizers, 4) == pytest.approx(0.1)
    assert [optimizer.param_groups[0]["lr"] for optimizer in adams] == pytest.approx([0.1] * 5)
    assert optimizers.centers is not None
    assert optimizers.centers.param_groups[0]["lr"] == 0.5


def test_the_fused_step_equals_the_plain_one(make_cfg: MakeCfg) -> None:
    nets = Nets(("C",))
    twin = copy.deepcopy(nets)
    optimizers = build(make_cfg, nets)
    plain = Adam(
        twin.official_networks["C"].parameters(), weight_decay=5e-4, fused=False, foreach=False
    )
    assert optimizers.main[0].param_groups[0]["fused"]
    for epoch in range(1, 21):
        plain.param_groups[0]["lr"] = set_learning_rate(optimizers, epoch)
        nets.backward()
        twin.backward()
        optimizers.step_main()
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(weights(nets)["C"], weights(twin)["C"], rtol=1e-5, atol=1e-7)


def test_a_restored_run_continues_identically(make_cfg: MakeCfg) -> None:
    nets, centers = Nets(), CenterLoss(2, 2)
    optimizers = build(make_cfg, nets, centers)
    nets.backward()
    optimizers.step_discriminators()
    optimizers.step_main()

    twin = copy.deepcopy(nets)
    restored = build(make_cfg, twin, copy.deepcopy(centers))
    restored.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for each, its in ((nets, optimizers), (twin, restored)):
        each.backward()
        its.step_discriminators()
        its.step_main()
    for letter, weight in weights(nets).items():
        assert torch.equal(weight, weights(twin)[letter])


@pytest.mark.parametrize("before", [torch.channels_last, torch.contiguous_format])
def test_moments_of_another_memory_format_are_converted(
    make_cfg: MakeCfg, before: torch.memory_format
) -> None:
    """RUNTIME.CHANNELS_LAST may change between a run and its resume."""
    after = {torch.channels_last, torch.contiguous_format} - {before}
    torch.manual_seed(0)
    nets, images = Nets(("C",)), torch.randn(2, 4, 5, 5)
    network = nn.Conv2d(4, 6, 3).to(memory_format=before)
    nets.official_networks["C"] = network  # type: ignore[assignment]
    optimizers = build(make_cfg, nets)
    network(images).square().sum().backward()
    optimizers.step_main()

    twin = copy.deepcopy(nets)
    twin.official_networks["C"].to(memory_format=after.pop())  # type: ignore[call-overload]
    restored = build(make_cfg, twin)
    restored.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for each, its in ((nets, optimizers), (twin, restored)):
        each.official_networks["C"](images).square().sum().backward()
        its.step_main()
    torch.testing.assert_close(weights(twin)["C"], weights(nets)["C"])


def test_values_changed_before_a_resume_are_used(make_cfg: MakeCfg) -> None:
    saved = build(make_cfg, Nets(("C",)), CenterLoss(2, 2)).state_dict()
    cfg = make_cfg("SOLVER.WEIGHT_DECAY", "0.25", "SOLVER.CENTER_LR", "0.75")
    optimizers = build_optimizers(cfg, Nets(("C",)).official_networks, CenterLoss(2, 2))
    optimizers.load_state_dict(saved)
    assert optimizers.main[0].param_groups[0]["weight_decay"] == 0.25
    assert optimizers.centers is not None
    assert optimizers.centers.param_groups[0]["lr"] == 0.75


def test_state_of_other_optimisers_is_an_error(make_cfg: MakeCfg) -> None:
    joint = build(make_cfg, Nets(), CenterLoss(2, 2)).state_dict()
    alone = build(make_cfg, Nets(("C",)))
    with pytest.raises(UserError, match="optimisers of C, D1, D2, G, G_R, centers; this run has C"):
        alone.load_state_dict(joint)

    other = Nets(("C",))
    other.official_networks["C"] = nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match="optimiser of C does not fit"):
        build(make_cfg, other).load_state_dict(alone.state_dict())


def test_the_baseline_has_no_discriminators(make_cfg: MakeCfg) -> None:
    optimizers = build(make_cfg, Nets(("C",)))
    assert len(optimizers.main) == 1
    assert optimizers.discriminators == []
    assert optimizers.centers is None
    optimizers.step_discriminators()
