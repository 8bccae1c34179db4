"""Global pooling of a feature map into one vector an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.precision import full_precision


class GeneralizedMeanPooling(nn.Module):
    """Generalised mean over all positions, (mean x^p)^(1/p), with a learnt exponent p.

    p = 1 is average pooling, p -> infinity is max pooling. Values below ``floor`` (all negative
    ones) are lifted to it, because a power of a negative number has no real value.

    Source: F. Radenovic, G. Tolias, O. Chum, "Fine-tuning CNN image retrieval with no human
    annotation", TPAMI 2019.

    Args:
        exponent: Start of p.
        floor: Lower bound of the values that are pooled.
    """

    def __init__(self, exponent: float = 3.0, floor: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), exponent))
        self.floor = floor

    def forward(self, features: Tensor) -> Tensor:
        """Pool (B, C, H, W) into float32 (B, C)."""
        with full_precision(features):
            powers = features.float().clamp(min=self.floor).pow(self.p)
            # Not mean(): its gradient is a map in another memory format, and a division more.
            mean = powers.sum(dim=(2, 3)) / (features.shape[2] * features.shape[3])
            return mean.pow(1.0 / self.p)


class AveragePooling(nn.Module):
    """Mean over all positions."""

    def forward(self, features: Tensor) -> Tensor:
        """Pool (B, C, H, W) into float32 (B, C)."""
        with full_precision(features):
            return features.float().mean(dim=(2, 3))
