"""Interface between the re-ID network and its backbones."""

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
    """A class of backbones, or a function that returns a backbone."""

    def __call__(self, *, last_stride: int, stem_relu: bool) -> Backbone:
        """Build a backbone with random weights.

        Args:
            last_stride: Stride of the last stage, 1 by default.
            stem_relu: Whether a ReLU follows the stem, False by default.

        Raises:
            UserError: The backbone has no such part, and the value is not the default.
        """
        ...
