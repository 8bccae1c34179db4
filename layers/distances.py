"""Distances between feature vectors, exact where they are small."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.precision import full_precision

SMALLEST_SQUARE = 1e-12


def pairwise_euclidean(first: Tensor, second: Tensor) -> Tensor:
    """Return all Euclidean distances, the squares clamped below at 1e-12.

    Differences are summed directly instead of through |a|^2 + |b|^2 - 2ab: that loses the digits
    of small distances, and what is left of a zero distance then gets a gradient of order 1/noise.
    Here the gradient of a pair closer than 1e-6 (each image with itself, duplicates) is zero.

    Args:
        first: (M, D).
        second: (N, D).

    Returns:
        float32 (M, N), at least 1e-6.
    """
    with full_precision(first):
        distances = torch.cdist(
            first.float(), second.float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return distances.clamp(min=SMALLEST_SQUARE**0.5)
