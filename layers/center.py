"""Centre loss: one learnt centre for each identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.precision import full_precision


class CenterLoss(nn.Module):
    """Batch mean of the squared distance to the own identity's centre.

    Centres are a module of their own because they are learnt by their own optimiser.

    Source: Y. Wen, K. Zhang, Z. Li, Y. Qiao, "A Discriminative Feature Learning Approach for Deep
    Face Recognition", ECCV 2016; without its factor 1/2.

    Args:
        num_classes: Identities N.
        feature_size: Length D of a feature.
    """

    def __init__(self, num_classes: int, feature_size: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_size))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the 0-d float32 loss of features (B, D) with labels (B,) in 0..N-1."""
        with full_precision(features):
            differences = features.float() - self.centers[labels]
            return differences.square().sum(dim=1).mean()
