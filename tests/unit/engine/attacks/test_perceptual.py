"""LPIPS: when it is available, its value, and its place in the model attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from engine.attacks import measures
from engine.attacks.measures import BACKBONE_FILE, lpips_distances, reason_against_lpips
from engine.attacks.suite import ATTACKS
from tests.fixtures.attack_scene import make_scene

CPU = torch.device("cpu")


class MeanDifference:
    """Replaces the metric of torchmetrics: the mean absolute difference of each image."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def to(self, device: torch.device) -> MeanDifference:  # noqa: ARG002
        return self

    def reset(self) -> None:
        self.scores = []

    def update(self, one: Tensor, other: Tensor) -> None:
        self.scores.append((one - other).abs().flatten(1).mean(1))

    def compute(self) -> Tensor:
        return torch.cat(self.scores)


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(measures, "find_spec", lambda _: None)
    assert reason_against_lpips(256, 128).startswith("torchmetrics is not installed")
    monkeypatch.setattr(measures, "find_spec", lambda _: object())
    file = tmp_path / "hub" / "checkpoints" / BACKBONE_FILE
    assert f"are not in {file}, and nothing is downloaded" in reason_against_lpips(256, 128)
    file.parent.mkdir(parents=True)
    file.touch()
    assert reason_against_lpips(256, 128) == ""
    assert reason_against_lpips(32, 16).startswith("images of 32 x 16 px are too small")


def test_distances_are_one_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    network = MeanDifference()
    monkeypatch.setattr(measures, "_lpips_network", lambda: network)
    truth = torch.rand(70, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images = truth.flip(0)
    images[3] = torch.nan
    for _ in range(2):  # the second call does not contain the first one's scores
        found = lpips_distances(truth, images, CPU)
    expected = (truth - images.nan_to_num(0.5)).abs().flatten(1).mean(1)
    torch.testing.assert_close(found, expected)


def test_the_model_attack_reports_lpips_or_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    result: Any = ATTACKS["model-linear"].run(make_scene(), "anonymized").result
    assert "too small" in result.details["no_lpips"] or "not" in result.details["no_lpips"]
    assert "LPIPS" not in result.sentence
    monkeypatch.setattr("engine.attacks.network_attacks.reason_against_lpips", lambda *_: "")
    network = MeanDifference()
    monkeypatch.setattr(measures, "_lpips_network", lambda: network)
    result = ATTACKS["model-linear"].run(make_scene(), "anonymized").result
    measure = next(m for m in result.measures if m.name == "lpips")
    assert measure.value.value < measure.floor.value  # closer than the guess
    assert measure.bad_side == "below" and not measure.decides
    assert f"LPIPS {measure.value.value:.3f}" in result.sentence
    assert "no_lpips" not in result.details


def test_lpips_of_torchmetrics_with_a_random_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers mean nothing, but a distance is 0 for equal images and grows with noise."""
    pytest.importorskip("torchmetrics")
    with torch.device("meta"):  # its 60 million other weights would take seconds
        alexnet = torchvision.models.alexnet()
    alexnet.features.to_empty(device="cpu")
    torch.manual_seed(1)
    for parameter in alexnet.features.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda **_: alexnet)
    measures._lpips_network.cache_clear()
    generator = torch.Generator().manual_seed(1)
    truth = 0.2 + 0.6 * torch.rand(2, 3, 64, 32, generator=generator)
    noise = torch.randn(truth.shape, generator=generator)
    try:
        same, little, much = (
            lpips_distances(truth, truth + s * noise, CPU) for s in (0, 0.02, 0.2)
        )
    finally:
        measures._lpips_network.cache_clear()
    assert torch.equal(same, torch.zeros(2))
    assert (little > 0).all() and (little < much).all()
