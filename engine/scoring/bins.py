"""Bins of similarity, so fine that a rate counted in them is exact for its threshold.

They are 2^-19 = 1.9e-6 wide, as fine as float32 products of this length are exact. Thresholds are
lower edges of bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.scoring.ragged import Indices

BINS = 2**20


def bins_of(similarity: Tensor) -> Tensor:
    """Return the bin of each cosine, int64, 0..BINS; what is no number is as far as can be."""
    scaled = (similarity.clamp(-1.0, 1.0) + 1.0) * (BINS / 2)
    return scaled.nan_to_num_(0.0).floor_().long()


def threshold_of(bins: int | Indices) -> NDArray[np.float64]:
    """Return the lowest cosine of a bin, float64."""
    return np.asarray(bins, np.float64) / (BINS / 2) - 1.0
