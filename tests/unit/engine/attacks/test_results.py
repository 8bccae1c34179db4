"""Verdicts as a decision table, and JSON there and back."""

from __future__ import annotations

import json
import math

import pytest
import torch

from engine.attacks.measures import (
    FAILS,
    HOLDS,
    CurvePoint,
    Measure,
    Result,
    exactly,
    share_measure,
)
from engine.attacks.suite import report
from engine.scoring.intervals import Interval


def measure(low: float, high: float, *, decides: bool = True, bad_side: str = "above") -> Measure:
    value = Interval((low + high) / 2, low, high)
    return Measure("gain", "rate", value, Interval(0.5, 0.4, 0.6), decides, bad_side)


@pytest.mark.parametrize(
    ("low", "high", "bad_side", "verdict"),
    [
        (0.45, 0.55, "above", HOLDS),  # within
        (0.55, 0.90, "above", HOLDS),  # the intervals overlap
        (0.60, 0.90, "above", HOLDS),  # they touch
        (0.60 + 1e-9, 0.90, "above", HOLDS),  # by rounding
        (0.61, 0.90, "above", FAILS),  # wholly above
        (0.10, 0.20, "above", HOLDS),  # an attack worse than luck gains nothing
        (0.10, 0.20, "below", FAILS),  # but what an owner loses counts downwards
        (0.61, 0.90, "below", HOLDS),
    ],
)
def test_verdict(low: float, high: float, bad_side: str, verdict: str) -> None:
    assert Result("a", "raw", "s", (measure(low, high, bad_side=bad_side),)).verdict == verdict


def test_only_deciding_measures_decide_and_one_suffices() -> None:
    beyond, within = measure(0.7, 0.8), measure(0.4, 0.5)
    shown_only = measure(0.7, 0.8, decides=False)
    assert Result("a", "raw", "s", (within, shown_only)).verdict == HOLDS
    assert Result("a", "raw", "s", (within, shown_only, beyond)).verdict == FAILS


@pytest.mark.parametrize(("opened", "persons"), [(1, 16), (3, 16), (3, 40), (3, 100), (40, 40)])
def test_one_opened_image_is_no_luck_where_none_can_be(opened: int, persons: int) -> None:
    """Its interval over persons reaches 0: some resamples miss the few who were opened."""
    values = [1] * opened + [0] * (persons - opened)
    found = share_measure("opened", values, torch.arange(persons), 1, floor=2.0**-240)
    assert Result("brute-force", "aead", "s", (found,)).verdict == FAILS
    again = Result.from_json(Result("brute-force", "aead", "s", (found,)).to_json())
    assert again.verdict == FAILS


def test_nothing_opened_holds_where_the_floor_is_exact() -> None:
    found = share_measure("opened", [0] * 16, torch.arange(16), 1)
    assert Result("wrong-key", "aead", "s", (found,)).verdict == HOLDS


def test_one_damaged_value_is_a_loss() -> None:
    """One of 2 million values: fewer than rounding may change elsewhere."""
    value = Interval(1 - 5e-7, 1 - 9e-7, 1.0)
    exact = {"decides": True, "bad_side": "below", "floor_is_exact": True}
    found = Measure("exact", "rate", value, exactly(1.0), **exact)  # type: ignore[arg-type]
    assert Result("storage", "aead", "s", (found,)).verdict == FAILS
    whole = Measure("exact", "rate", exactly(1.0), exactly(1.0), **exact)  # type: ignore[arg-type]
    assert Result("storage", "aead", "s", (whole,)).verdict == HOLDS


def test_an_attack_that_nothing_failed_is_said_to_be_unproven() -> None:
    held, failed = (
        Result("model", level, "S.", (measure(low, low + 0.1),))
        for level, low in (("aead", 0.4), ("raw", 0.7))
    )
    absent = Result("model", "desensitized", "so", applies=False)
    assert "does not show that the attack works" in report([held, absent])
    assert "does not show" not in report([held, failed, absent])


def test_json_there_and_back() -> None:
    nothing = Measure("r", "r", exactly(math.nan), exactly(math.inf))
    curve = (CurvePoint(8, (measure(0, 1),)), CurvePoint(16, (nothing,)))
    result = Result(
        "model", "aead", "Nothing.", (measure(0.7, 0.8),), seed=3, budget=16, budget_unit="images",
        num_persons=4, num_images=9, curve_of="images", curve=curve, details={"best": {"8": 2}},
    )  # fmt: skip
    text = json.dumps(result.to_json(), allow_nan=False)
    content = json.loads(text)
    assert content["verdict"] == FAILS
    assert content["measures"][0]["beyond_floor"] is True
    again = Result.from_json(content)
    assert again.measures == result.measures
    assert again.to_json()["measures"] == result.to_json()["measures"]
    assert (again.details, again.curve[0], again.verdict) == (result.details, curve[0], FAILS)
    assert math.isnan(again.curve[1].measures[0].value.value)


def test_what_does_not_apply_has_a_reason() -> None:
    result = Result("brute-force", "raw", "nothing is encrypted", applies=False)
    assert result.verdict == "not applicable"
    assert Result.from_json(result.to_json()) == result
