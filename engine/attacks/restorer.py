"""An image restorer as an alternative to the U-Net, for the attacker of ``model-restorer``.

A small NAFNet: residual blocks without activation functions at several scales, and a skip from the
input to the output. Source: Chen et al., "Simple Baselines for Image Restoration", ECCV 2022. Here
the norm is a group norm with one group, which needs no reshaping.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDTH = 24
_ENCODER = (1, 1, 2, 2)  # blocks at each scale; each scale halves the size and doubles the width
_MIDDLE = 2
_DECODER = (1, 1, 1, 1)


class Restorer(nn.Module):
    """Maps normalised images (B, 3, H, W) to normalised images of the same size.

    Args:
        width: Channels at the full size.
    """

    def __init__(self, width: int = _WIDTH) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for blocks in _ENCODER:
            self.encoder.append(_blocks(width, blocks))
            self.down.append(nn.Conv2d(width, 2 * width, 2, stride=2))
            width *= 2
        self.middle = _blocks(width, _MIDDLE)
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        for blocks in _DECODER:
            up = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.PixelShuffle(2))
            self.up.append(up)
            width //= 2
            self.decoder.append(_blocks(width, blocks))
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Restore images of any size."""
        height, width = image.shape[-2:]
        step = 2 ** len(_ENCODER)
        padded = F.pad(image, (0, -width % step, 0, -height % step), mode="replicate")
        features, skips = self.stem(padded), []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            skips.append(blocks(features))
            features = down(skips[-1])
        features = self.middle(features)
        for blocks, up in zip(self.decoder, self.up, strict=True):
            features = blocks(up(features) + skips.pop())
        restored: Tensor = padded + self.head(features)
        return restored[..., :height, :width]


class Block(nn.Module):
    """A residual block: depthwise convolution with channel attention, then a gated 1 x 1 layer.

    The residual branches start at 0, so a new block is the identity.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width),
            Gate(),
        )
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1))
        self.project = nn.Conv2d(width, width, 1)
        self.feed = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            Gate(),
            nn.Conv2d(width, width, 1),
        )
        self.scale = nn.Parameter(torch.zeros(2, width, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, width, H, W) to the same shape."""
        mixed = self.mix(features)
        features = features + self.scale[0] * self.project(mixed * self.attention(mixed))
        out: Tensor = features + self.scale[1] * self.feed(features)
        return out


class Gate(nn.Module):
    """Multiplies the two halves of the channels."""

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, 2 C, H, W) to (B, C, H, W)."""
        left, right = features.chunk(2, 1)
        return left * right


def _blocks(width: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(number)))
