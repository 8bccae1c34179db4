"""What the re-ID network needs of a backbone."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Backbone(nn.Module):
    """Base of every feature extractor.

    Attributes:
        out_channels: Channels C of the feature map.
        signed: Whether about half of the features are negative. Generalised-mean pooling would
            replace them by 0.
    """

    out_channels: int
    signed: bool = False

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to features (B, C, H', W')."""
        raise NotImplementedError


class MakeBackbone(Protocol):
    """A class of backbones, or whatever else makes one."""

    def __call__(self, *, last_stride: int, stem_relu: bool) -> Backbone:
        """Build a backbone with random weights.

        Args:
            last_stride: Stride of the last stage (MODEL.LAST_STRIDE), 1 by default.
            stem_relu: Whether a ReLU follows the stem (MODEL.STEM_RELU), by default not.

        Raises:
            UserError: It cannot be built so. One that has no such part refuses all but the default.
        """
        ...
