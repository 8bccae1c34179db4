"""Float32 that is computed in float32.

PyTorch may round float32 inputs to TF32 (GPUs) or bfloat16 (CPUs), and autocast computes in
bfloat16. The contexts here prevent one or the other. Scores, losses, pooling with powers and
normalisation statistics would lose digits; their inputs are small, so float32 costs little.

All settings but autocast's hold for the whole process: threads that enter and leave these contexts
at different times undo each other's settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``like``.

    It converts nothing: call ``.float()`` on inputs that may be bfloat16.
    """
    # Autocast knows no meta device (tensors without values, with which FLOPs are counted).
    device = "cpu" if like.is_meta else like.device.type
    return torch.autocast(device, enabled=False)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute matrix products in float32: no autocast, no TF32, no bfloat16 passes."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products in float32; the settings are restored."""
    backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    with _ieee([backend.matmul for backend in backends]):
        yield


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute float32 convolutions in float32; the settings are restored.

    By default cuDNN rounds their inputs to TF32 (10 bits).
    """
    # Not the common switch of cuDNN: reading it raises if its two settings differ.
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    with _ieee([cudnn.conv, cudnn.rnn, onednn.conv]):
        yield


@contextmanager
def _ieee(settings: Sequence[Any]) -> Iterator[None]:
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
