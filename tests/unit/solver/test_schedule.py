"""The learning rate of each epoch."""

from __future__ import annotations

import pytest

from solver.optimizers import LearningRateSchedule
from tests.fixtures.golden import golden_json


def schedule(**changes: object) -> LearningRateSchedule:
    values = {
        "base_lr": 1.0,
        "steps": (4, 6),
        "gamma": 0.1,
        "warmup_factor": 0.2,
        "warmup_iters": 3,
        "warmup_method": "linear",
    }
    return LearningRateSchedule(**(values | changes))  # type: ignore[arg-type]


def test_golden_schedule() -> None:
    golden = golden_json("lr_schedule.json")
    expected = golden.pop("lr_of_epoch_1_to_120")
    rates = schedule(
        **{name.lower(): value for name, value in golden.items() if name != "STEPS"},
        steps=tuple(golden["STEPS"]),
    )
    actual = [rates(epoch) for epoch in range(1, 121)]
    assert actual == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(1, 0.2 * 2 / 3 + 1 / 3), (3, 1.0), (4, 0.1), (5, 0.1), (6, 0.01)]
)
def test_linear_warmup_and_inclusive_steps(epoch: int, rate: float) -> None:
    assert schedule()(epoch) == pytest.approx(rate)


def test_constant_warmup() -> None:
    rates = schedule(warmup_method="constant")
    assert [rates(epoch) for epoch in (1, 2, 3)] == pytest.approx([0.2, 0.2, 1.0])


def test_no_warmup() -> None:
    assert schedule(warmup_iters=0)(1) == 1.0
