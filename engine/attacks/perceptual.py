"""LPIPS, a perceptual distance, if its network is already on this machine.

torchmetrics contains the weights that LPIPS was trained to, but not those of its AlexNet backbone,
which torchvision would download. Nothing is downloaded here.

Source: R. Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
CVPR 2018.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.attacks.measures import Measure, interval_of
from utils.errors import optional_package

BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
_INSTALL = "python3 -m pip install torchmetrics"
_LEAST_SIDE = 31  # px; AlexNet's second pooling has no output for smaller images


def reason_against_lpips(height: int, width: int) -> str:
    """Return why LPIPS cannot be computed for images of this size; empty if it can."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_FILE
    if find_spec("torchmetrics") is None:
        return f"torchmetrics is not installed ({_INSTALL})"
    if not weights.is_file():
        return f"AlexNet's ImageNet weights are not in {weights}, and nothing is downloaded"
    if min(height, width) < _LEAST_SIDE:
        return f"images of {height} x {width} px are too small; LPIPS needs {_LEAST_SIDE} px"
    return ""


def lpips_measure(
    attacked: Tensor, truth: Tensor, guess: Tensor, pids: Tensor, seed: int, device: torch.device
) -> Measure:
    """Return the mean LPIPS of the attacker's images to their targets; smaller is more similar.

    Args:
        attacked: Images of the attacker, values in [0, 1] (N, 3, H, W).
        truth: Target images (N, 3, H, W).
        guess: The best guess without the stored image, (1, 3, H, W); its LPIPS is the floor.
        pids: Identities (N,).
        seed: Seed of the bootstrap.
        device: Device of the network.
    """
    value, floor = (
        interval_of(distances(truth, images.expand_as(truth), device).numpy(), pids, seed)
        for images in (attacked, guess)
    )
    return Measure("lpips", "lpips", value, floor, bad_side="below")


@torch.no_grad()
def distances(truth: Tensor, images: Tensor, device: torch.device) -> Tensor:
    """Return the LPIPS (N,) of images (N, 3, H, W) with values in [0, 1]; NaN counts as grey."""
    metric = _network().to(device)
    metric.reset()
    images = images.nan_to_num(0.5, posinf=1.0, neginf=0.0).clamp(0, 1)
    for one, other in zip(truth.clamp(0, 1).split(64), images.split(64), strict=True):
        metric.update(one.to(device), other.to(device))
    scores: Tensor = metric.compute()
    return scores.reshape(-1).cpu()


@lru_cache(maxsize=1)
def _network() -> Any:
    module = optional_package("torchmetrics.image.lpip", "LPIPS", _INSTALL)
    return module.LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
