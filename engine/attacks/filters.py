"""Filters of an attacker: low-pass, median and mid-range, on normalised images (N, 3, H, W)."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

PAD_REACH = 1.0  # the published pad is uniform in [-1, 1], and so is the range of plain images
_MEDIAN_CHUNK = 16


class Filter(Protocol):
    """Turns images into images of the same shape."""

    def __call__(self, images: Tensor) -> Tensor:
        """Filter images (N, 3, H, W)."""
        ...


def gaussian(images: Tensor, sigma: float) -> Tensor:
    """Return a Gaussian blur; edges are repeated."""
    reach = max(1, round(3 * sigma))
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    taps = torch.exp(-place.square() / (2 * sigma * sigma))
    taps = (taps / taps.sum()).to(images.device)
    count, channels, height, width = images.shape
    planes = images.reshape(count * channels, 1, height, width)
    planes = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    planes = F.conv2d(planes, taps.view(1, 1, 1, -1))
    return F.conv2d(planes, taps.view(1, 1, -1, 1)).view(count, channels, height, width)


def high_pass(images: Tensor) -> Tensor:
    """Return what a narrow Gaussian blur takes away: noise, and fine edges."""
    return images - gaussian(images, 1.0)


def median(images: Tensor, size: int) -> Tensor:
    """Return the median of each size x size window; edges are repeated."""
    reach = size // 2
    parts = []
    for part in images.split(_MEDIAN_CHUNK):
        padded = F.pad(part, (reach,) * 4, mode="replicate")
        windows = padded.unfold(2, size, 1).unfold(3, size, 1)
        parts.append(windows.flatten(-2).median(-1).values)
    return torch.cat(parts)


def block_mid_range(images: Tensor, size: int) -> Tensor:
    """Return the middle between least and greatest value of each block, over the whole block.

    For a constant block under uniform noise that estimate is far better than the mean: its error
    falls with the number of pixels, not with its root.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % size, 0, -height % size), mode="replicate")
    middle = (F.max_pool2d(padded, size) - F.max_pool2d(-padded, size)) / 2
    spread = F.interpolate(middle, scale_factor=float(size), mode="nearest")
    return spread[..., :height, :width]


def within_pad(estimate: Tensor, observed: Tensor) -> Tensor:
    """Cut an estimate to what a pad in [-1, 1] allows: no further than 1 from what is seen."""
    low = (observed - PAD_REACH).clamp(-1, 1)
    high = (observed + PAD_REACH).clamp(-1, 1)
    return torch.minimum(torch.maximum(estimate, low), high)


def filter_bank() -> dict[str, Filter]:
    """Return the denoisers that an attacker tries, by name."""
    bank: dict[str, Filter] = {}
    for sigma in (1, 2, 3, 4, 6, 8, 12):
        bank[f"gaussian {sigma}"] = partial(gaussian, sigma=float(sigma))
    for size in (3, 5, 7):
        bank[f"median {size}"] = partial(median, size=size)
    for size in (4, 6, 8, 12, 16, 24):
        bank[f"mid-range of {size} x {size}"] = partial(block_mid_range, size=size)
    return bank
