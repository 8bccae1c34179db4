"""Supervision upgradation as a decision table, and the target that follows from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.supervision import (
    Supervision,
    UpgradePolicy,
    UpgradeState,
    Validation,
    decide,
)

POLICY = UpgradePolicy(rank1=0.75, rank1_slack=0.05, psnr_margin_db=1.0, ssim_margin=0.05)
GOOD = Validation(0.8, 15.0, 15.0, 0.5, 0.5)
FRESH = UpgradeState()
UPGRADED = UpgradeState(count=1, best_rank1=0.8, epoch=10, in_force=True)
SUSPENDED = replace(UPGRADED, in_force=False)


@pytest.mark.parametrize(
    ("change", "qualifies"),
    [
        ({}, True),
        ({"rank1": 0.701}, True),  # within the slack
        ({"rank1": 0.70}, False),  # must be above the bound
        ({"rank1": 0.5}, False),
        ({"psnr_anonymized_db": 15.999}, True),
        ({"psnr_anonymized_db": 16.0}, False),
        ({"psnr_anonymized_db": 3.0}, True),  # less similar to raw always qualifies
        ({"ssim_anonymized": 0.549}, True),
        ({"ssim_anonymized": 0.55}, False),
        ({"psnr_anonymized_db": 20.0, "ssim_anonymized": 0.9}, False),
        ({"rank1": math.nan}, False),
        ({"psnr_anonymized_db": math.nan}, False),
    ],
)
def test_qualifies(change: dict[str, float], qualifies: bool) -> None:
    assert POLICY.qualifies(replace(GOOD, **change)) is qualifies


@pytest.mark.parametrize(
    ("rank1", "rank1_raw", "qualifies"),
    [
        (0.46, 0.5, True),  # above 0.9 x 0.5; the slack is not used
        (0.45, 0.5, False),  # must be above the threshold
        (0.44, 0.5, False),
        (0.46, 0.6, False),
        (0.0, 0.0, False),
        (0.9, math.nan, False),
    ],
)
def test_a_share_of_raw_rank1_qualifies(rank1: float, rank1_raw: float, qualifies: bool) -> None:
    policy = UpgradePolicy.of("0.9x", 0.05, 1.0, 0.05)
    assert policy.enabled
    validation = replace(GOOD, rank1=rank1, rank1_raw=rank1_raw)
    assert policy.qualifies(validation) is qualifies
    assert not policy.qualifies(replace(validation, ssim_anonymized=0.9))


def test_policies_of_numbers_are_the_published_ones() -> None:
    assert UpgradePolicy.of(0.75, 0.05, 1.0, 0.05) == POLICY
    assert UpgradePolicy.of("0.75", 0.05, 1.0, 0.05) == POLICY
    assert not UpgradePolicy.of("inf", 0.05, 1.0, 0.05).enabled


@pytest.mark.parametrize(
    ("before", "seen", "after", "freezes"),
    [
        # the first that qualifies is frozen
        (FRESH, GOOD, UpgradeState(1, 0.8, 20, True), True),
        # a better one replaces it
        (UPGRADED, replace(GOOD, rank1=0.9), UpgradeState(2, 0.9, 20, True), True),
        # an equal or worse one that qualifies leaves the old copy in force
        (UPGRADED, GOOD, UPGRADED, False),
        (UPGRADED, replace(GOOD, rank1=0.72), UPGRADED, False),
        # one that does not qualify suspends it, whichever condition fails
        (UPGRADED, replace(GOOD, rank1=0.1), SUSPENDED, False),
        (UPGRADED, replace(GOOD, ssim_anonymized=0.9), SUSPENDED, False),
        # ... even when its rank-1 would be the best
        (UPGRADED, replace(GOOD, rank1=0.99, ssim_anonymized=0.9), SUSPENDED, False),
        # back again without a new copy, or with one
        (SUSPENDED, replace(GOOD, rank1=0.75), UPGRADED, False),
        (SUSPENDED, replace(GOOD, rank1=0.85), UpgradeState(2, 0.85, 20, True), True),
        (FRESH, replace(GOOD, rank1=0.1), FRESH, False),
    ],
)
def test_decision_table(
    before: UpgradeState, seen: Validation, after: UpgradeState, freezes: bool
) -> None:
    assert decide(before, POLICY, seen, epoch=20) == (after, freezes)


def test_without_val_r1_nothing_is_upgraded() -> None:
    policy = UpgradePolicy()
    assert not policy.enabled
    assert decide(FRESH, policy, replace(GOOD, rank1=1.0), 1) == (FRESH, False)


class _Scale(nn.Module):
    """A stand-in for an anonymizer whose output identifies the copy."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.factor * x)


def test_target_follows_the_state_and_the_copy_is_frozen() -> None:
    raw, desensitized = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    anonymizer = _Scale(2.0).train()
    supervision = Supervision(POLICY)
    assert supervision.target(raw, desensitized) is desensitized

    supervision.update(GOOD, 10, anonymizer)
    with torch.no_grad():
        anonymizer.factor.fill_(5.0)  # training continues
    target = supervision.target(raw, desensitized)
    assert torch.equal(target, 2 * raw)  # the copy of epoch 10, without its dropout
    assert not target.requires_grad
    assert anonymizer.training and anonymizer.factor.requires_grad

    supervision.update(replace(GOOD, rank1=0.1), 20, anonymizer)
    assert supervision.target(raw, desensitized) is desensitized
    supervision.update(GOOD, 30, anonymizer)
    assert torch.equal(supervision.target(raw, desensitized), 2 * raw)


def test_state_survives_a_checkpoint() -> None:
    supervision = Supervision(POLICY)
    supervision.update(GOOD, 10, _Scale(2.0))
    restored = Supervision(POLICY)
    restored.load_state_dict(supervision.state_dict(), _Scale(7.0))
    raw = torch.ones(1, 3, 4, 4)
    assert restored.state == supervision.state
    assert torch.equal(restored.target(raw, torch.zeros_like(raw)), 2 * raw)


def test_every_change_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    supervision = Supervision(POLICY)
    with caplog.at_level("INFO", logger="reid_baseline"):
        supervision.update(replace(GOOD, rank1=0.2), 5, _Scale(1.0))
        supervision.update(GOOD, 10, _Scale(1.0))
        supervision.update(replace(GOOD, ssim_anonymized=0.9), 20, _Scale(1.0))
        supervision.update(GOOD, 30, _Scale(1.0))
    text = [record.getMessage() for record in caplog.records]
    assert "No supervision upgrade at epoch 5: rank-1 0.200" in text[0]
    assert "upgraded at epoch 10" in text[1]
    assert "falls back" in text[2] and "too close to raw" in text[2]
    assert "in force again at epoch 30" in text[3] and "epoch 10" in text[3]


def test_the_threshold_of_a_share_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    supervision = Supervision(UpgradePolicy(rank1_share=0.9), ema=0.99)
    with caplog.at_level("INFO", logger="reid_baseline"):
        supervision.update(replace(GOOD, rank1=0.4, rank1_raw=0.5), 5, _Scale(1.0))
        supervision.update(replace(GOOD, rank1=0.4, rank1_raw=0.4), 10, _Scale(1.0))
        supervision.update(replace(GOOD, rank1=0.1, rank1_raw=0.4), 20, _Scale(1.0))
        supervision.update(replace(GOOD, rank1=0.4, rank1_raw=0.4), 30, _Scale(1.0))
    text = [record.getMessage() for record in caplog.records]
    assert "rank-1 0.400 is not above 0.9 x raw->raw rank-1 0.500 = 0.450" in text[0]
    assert "rank-1 40.0% (above 0.9 x raw->raw = 36.0%), the target" in text[1]
    for line in (text[1], text[3]):  # upgraded, in force again
        assert line.endswith("followed by its moving average (decay 0.99)")


def _anonymizer(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    net(torch.randn(2, 3, 4, 4))  # running statistics
    return net.train()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_teacher_is_a_moving_average_of_the_anonymizer(ema: float) -> None:
    supervision = Supervision(POLICY, ema)
    anonymizer = _anonymizer(0)
    supervision.follow(anonymizer)  # nothing to move before the first upgrade
    supervision.update(GOOD, 1, anonymizer)
    assert supervision.teacher is not None
    expected = {k: v.double() for k, v in supervision.teacher.state_dict().items()}
    for seed in (1, 2, 3):
        with torch.no_grad():
            for parameter, other in zip(
                anonymizer.parameters(), _anonymizer(seed).parameters(), strict=True
            ):
                parameter.copy_(other)
        anonymizer(torch.randn(2, 3, 4, 4))
        supervision.follow(anonymizer)
        if ema:
            new = anonymizer.state_dict()
            expected = {k: ema * v + (1 - ema) * new[k].double() for k, v in expected.items()}
    teacher = supervision.teacher.state_dict()
    for name in set(teacher) - {"1.num_batches_tracked"}:
        torch.testing.assert_close(teacher[name].double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not supervision.teacher.training
    assert not any(p.requires_grad for p in supervision.teacher.parameters())

    supervision.update(replace(GOOD, rank1=0.1), 2, anonymizer)  # suspended: it does not move
    before = {k: v.clone() for k, v in teacher.items()}
    supervision.follow(_anonymizer(4))
    assert all(torch.equal(before[k], v) for k, v in supervision.teacher.state_dict().items())
