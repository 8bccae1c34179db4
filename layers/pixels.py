"""Pixel space: between images in [0, 1] and the normalised values the networks work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UserError


class PixelSpace:
    """Per-channel affine map between [0, 1] and normalised values, (x - mean) / std.

    It holds no tensors that have to be moved: constants are cached per device.

    Args:
        mean: Mean of each of the three channels on [0, 1].
        std: Standard deviation of each channel on [0, 1], positive.

    Raises:
        UserError: If there are not three numbers each, or a deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(
                f"INPUT.PIXEL_MEAN and INPUT.PIXEL_STD are {self.mean} and {self.std}; expected "
                "three numbers each, the deviations above 0"
            )
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        """Return the two triples."""
        return f"PixelSpace(mean={self.mean}, std={self.std})"

    def __eq__(self, other: object) -> bool:
        """Two spaces are equal when their constants are."""
        if not isinstance(other, PixelSpace):
            return NotImplemented
        return (self.mean, self.std) == (other.mean, other.std)

    def __hash__(self) -> int:
        """Hash the constants."""
        return hash((self.mean, self.std))

    def __getstate__(self) -> dict[str, object]:
        """Leave the device caches behind when sent to another process."""
        return {"mean": self.mean, "std": self.std, "_constants": {}}

    def normalize(self, image: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalise images.

        Args:
            image: (..., 3, H, W), uint8 in [0, 255] or floating point in [0, 1].
            out: Where to write, float32 of the same shape; saves a CPU half of the memory traffic.

        Returns:
            Same shape and memory format, float32.
        """
        mean, std = self._on(image.device)
        if out is not None:
            out.copy_(image)
            unit = out.div_(255.0) if image.dtype == torch.uint8 else out
            return unit.sub_(mean).div_(std)
        unit = image.float().div_(255.0) if image.dtype == torch.uint8 else image.float()
        return (unit - mean).div_(std)

    def denormalize(self, image: Tensor) -> Tensor:
        """Undo :meth:`normalize`; nothing is clamped, network outputs may leave [0, 1].

        Args:
            image: Normalised values (..., 3, H, W), floating point.

        Returns:
            Same shape, float32, raw images within [0, 1].
        """
        mean, std = self._on(image.device)
        return (image.float() * std).add_(mean)

    def to_uint8(self, image: Tensor) -> Tensor:
        """Turn normalised values (..., 3, H, W) into 8-bit pixels, rounded and clamped."""
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
