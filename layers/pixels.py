"""Pixel space: conversion between images in [0, 1] and the normalised input of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError


@dataclass(unsafe_hash=True)
class PixelSpace:
    """Per-channel affine map between [0, 1] and normalised values, (x - mean) / std.

    Constants are cached for each device, so that nothing has to be moved.

    Raises:
        UserError: There are not three finite numbers each, or a deviation is not positive.
    """

    mean: Sequence[float]  # mean of each of the three channels on [0, 1]
    std: Sequence[float]  # standard deviation of each channel on [0, 1], positive

    def __post_init__(self) -> None:
        try:
            mean = tuple(float(value) for value in self.mean)
            std = tuple(float(value) for value in self.std)
            valid = len(mean) == len(std) == 3 and min(std) > 0
            valid = valid and all(map(math.isfinite, mean + std))
        except (TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            raise UserError(
                f"the mean and standard deviation of pixels are {self.mean!r} and {self.std!r}; "
                "expected three numbers each, the deviations above 0"
            )
        self.mean, self.std = mean, std
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Leave out the cached tensors when sent to another process."""
        return {"mean": self.mean, "std": self.std, "_constants": {}}

    def normalize(self, image: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalise images (..., 3, H, W), uint8 in [0, 255] or floating point in [0, 1].

        The result is float32 of the same shape and memory format. Written to ``out``, it needs half
        the memory traffic on a CPU.
        """
        mean, std = self._on(image.device)
        if out is not None:
            out.copy_(image)
            unit = out.div_(255.0) if image.dtype == torch.uint8 else out
            return unit.sub_(mean).div_(std)
        unit = image.float().div_(255.0) if image.dtype == torch.uint8 else image.float()
        return (unit - mean).div_(std)

    def denormalize(self, image: Tensor) -> Tensor:
        """Invert :meth:`normalize`, float32, without clamping.

        Raw images are in [0, 1]; outputs of networks may be outside.
        """
        mean, std = self._on(image.device)
        return (image.float() * std).add_(mean)

    def to_uint8(self, image: Tensor) -> Tensor:
        """Convert normalised values (..., 3, H, W) to 8-bit pixels, rounded and clamped."""
        return self.denormalize(image).mul_(255.0).round_().clamp_(0, 255).to(torch.uint8)

    def mean_on(self, device: torch.device) -> Tensor:
        """Return the mean, float32 (3, 1, 1), on a device."""
        return self._on(device)[0]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            self._constants[device] = (
                torch.tensor(self.mean, device=device).view(3, 1, 1),
                torch.tensor(self.std, device=device).view(3, 1, 1),
            )
        return self._constants[device]
