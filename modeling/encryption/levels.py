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
    """Rounds images (B, 3, H, W) to pixels (B, H, W, 3), and looks pixels up again.

    A GPU may divide by multiplying with the reciprocal, so that the last bit would depend on the
    device: there the levels come from a table. On a CPU images are taken one at a time, as one
    stays in the cache; that is five times as fast as a whole batch.
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
        self._mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        step = torch.arange(256, dtype=torch.float64)
        if kind == KIND_TANH:
            table = ((2 * step - 255) / 255).expand(3, 256)
        else:
            shift = torch.tensor(mean, dtype=torch.float64).view(3, 1)
            table = (step / 255 - shift) / torch.tensor(std, dtype=torch.float64).view(3, 1)
        self._table = table.float().contiguous()
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def to_pixels(self, images: Tensor) -> Tensor:
        """Round images half to even; uint8 on the same device."""
        images = images.float()
        if images.device.type != "cpu":
            return self._rounded(images).permute(0, 2, 3, 1).contiguous()
        pixels = torch.empty(
            (len(images), *images.shape[2:], 3), dtype=torch.uint8, device=images.device
        )
        for image, target in zip(images, pixels, strict=True):
            torch.stack(self._rounded(image).unbind(0), dim=-1, out=target)
        return pixels

    def to_images(self, pixels: Tensor) -> Tensor:
        """Return float32 images on the device of the pixels."""
        planes = pixels.permute(0, 3, 1, 2)
        images = torch.empty(planes.shape, dtype=torch.float32, device=pixels.device)
        if pixels.device.type == "cpu" and self.kind == KIND_TANH:
            for plane, image in zip(planes, images, strict=True):
                image.copy_(plane).mul_(2).sub_(255).div_(255)
            return images
        table = self._on(pixels.device)[0]
        for channel in range(3):
            found = table[channel].index_select(0, planes[:, channel].reshape(-1).int())
            images[:, channel] = found.view_as(images[:, channel])
        return images

    def _rounded(self, images: Tensor) -> Tensor:
        """Return uint8 of the shape of images (..., 3, H, W)."""
        if self.kind == KIND_TANH:
            scaled = (images + 1).mul_(127.5)
        else:
            _, mean, std = self._on(images.device)
            scaled = (images * std).add_(mean).mul_(255)
        return scaled.round_().clamp_(0, 255).to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return table, mean and deviation on a device; sent there once."""
        if device not in self._constants:
            self._constants[device] = (
                self._table.to(device), self._mean.to(device), self._std.to(device)
            )  # fmt: skip
        return self._constants[device]
