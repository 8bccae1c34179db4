"""Float32 that is float32, where torch may be set to round it: TF32 on GPUs, bfloat16 on CPUs.

From torch 2.9 on each kind of operation has a setting of its own, which stands above the common
ones; before, there is one for products and one for cuDNN. All hold for the whole process: threads
that enter and leave at different times undo each other's.

Where autocast has to stay out: sums, powers and logarithms that need float32.

Measuring in full float32, whatever precision the caller trains with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_NAME, _EXACT = "fp32_precision", "ieee"


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products in float32; settings are restored."""
    if _has_new_settings():
        with _set(_matmul_settings(), _NAME, _EXACT):
            yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute float32 convolutions in float32; settings are restored.

    By itself cuDNN rounds their inputs to TF32, 10 bits.
    """
    if _has_new_settings():
        onednn: Any = torch.backends.mkldnn
        with _set([*_cudnn_settings(), onednn.conv], _NAME, _EXACT):
            yield
    else:
        with _set([torch.backends.cudnn], "allow_tf32", False):
            yield


def _has_new_settings() -> bool:
    return hasattr(torch.backends.cuda.matmul, _NAME)


def _matmul_settings() -> Sequence[Any]:
    backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    return [backend.matmul for backend in backends]


def _cudnn_settings() -> Sequence[Any]:
    # The common switch of cuDNN cannot be read while its two kinds of operation differ.
    cudnn: Any = torch.backends.cudnn
    return [cudnn.conv, cudnn.rnn]


@contextmanager
def _set(holders: Sequence[Any], name: str, value: object) -> Iterator[None]:
    before = [getattr(holder, name) for holder in holders]
    for holder in holders:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, old in zip(holders, before, strict=True):
            setattr(holder, name, old)


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``like``.

    Losses, pooling with powers and normalisation statistics lose digits in bfloat16; their inputs
    are small, so float32 costs nothing there. Inputs still have to be turned to float32 by
    ``.float()``, because the context casts nothing.
    """
    # Tensors without values, on which FLOPs are counted, know no autocast of their own.
    device = "cpu" if like.is_meta else like.device.type
    return torch.autocast(device, enabled=False)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute matrix products in float32: no autocast, no TF32, no bfloat16 passes."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield
