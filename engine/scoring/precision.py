"""Measuring in full float32, whatever precision the caller trains with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.float32 import exact_products


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute matrix products in float32: no autocast, no TF32, no bfloat16 passes."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield
