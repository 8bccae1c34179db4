"""Where autocast has to stay out: sums, powers and logarithms that need float32."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``like``.

    Losses, pooling with powers and normalisation statistics lose digits in bfloat16; their inputs
    are small, so float32 costs nothing there. Inputs still have to be turned to float32 by
    ``.float()``, because the context casts nothing.
    """
    # Tensors without values, on which FLOPs are counted, know no autocast of their own.
    device = "cpu" if like.is_meta else like.device.type
    return torch.autocast(device, enabled=False)
