"""What a pixel byte means: 256 float values per channel, the same on every device.

Kind 0 (RGB8): byte b is the colour b/255, normalised with the data set's mean and deviation.
Colours of the network that lie outside [0, 1] are clipped.
Kind 1 (tanh): byte b is b/127.5 - 1, the network's own output range; nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.encryption.picture import KIND_RGB8, KIND_TANH


class PixelLevels:
    """Rounds images to bytes and looks bytes up again.

    A table instead of arithmetic, because a GPU divides by multiplying with the reciprocal: the
    last bit of b / 127.5 - 1 would depend on the device.
    """

    def __init__(
        self,
        kind: int = KIND_TANH,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        """Build the table.

        Args:
            kind: KIND_RGB8 or KIND_TANH.
            mean: Mean of each normalised channel; kind 1 does not depend on it.
            std: Deviation likewise.
        """
        if kind not in (KIND_RGB8, KIND_TANH):
            raise ValueError(f"pixel kind {kind}; expected 0 or 1")
        self.kind = kind
        if kind == KIND_TANH:
            mean = std = (0.5, 0.5, 0.5)
        self._mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        step = torch.arange(256, dtype=torch.float64)
        if kind == KIND_TANH:
            table = (step / 127.5 - 1).expand(3, 256)
        else:
            shift = torch.tensor(mean, dtype=torch.float64).view(3, 1)
            table = (step / 255 - shift) / torch.tensor(std, dtype=torch.float64).view(3, 1)
        self._table = table.float().contiguous()

    def to_bytes(self, images: Tensor) -> Tensor:
        """Round images (B, 3, H, W) half to even; uint8 of the same shape and device."""
        if self.kind == KIND_TANH:
            scaled = (images.float() + 1) * 127.5
        else:
            mean, std = self._mean.to(images.device), self._std.to(images.device)
            scaled = (images.float() * std + mean) * 255
        return scaled.round().clamp(0, 255).to(torch.uint8)

    def to_images(self, pixels: Tensor) -> Tensor:
        """Return float32 images for uint8 (B, 3, H, W), on the same device."""
        table = self._table.to(pixels.device)
        return torch.stack([table[c][pixels[:, c].long()] for c in range(3)], dim=1)
