"""Float32 that is float32, where torch may be set to round it: TF32 on GPUs, bfloat16 on CPUs.

From torch 2.9 on each kind of operation has a setting of its own. The older, common ones cannot
even be read (RuntimeError) once a caller has set some of these; then the new ones are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAME = "fp32_precision"


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products in float32; settings are restored."""
    if not _readable(torch.get_float32_matmul_precision):
        backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
        with _set(tuple(backend.matmul for backend in backends), _NAME, "ieee"):
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
    cudnn: Any = torch.backends.cudnn
    if _readable(lambda: cudnn.allow_tf32):
        with _set((cudnn,), "allow_tf32", False):
            yield
    else:
        with _set((cudnn.conv,), _NAME, "ieee"):
            yield


def _readable(setting: Callable[[], object]) -> bool:
    try:
        setting()
    except RuntimeError:
        return False
    return True


@contextmanager
def _set(holders: tuple[Any, ...], name: str, value: object) -> Iterator[None]:
    before = [getattr(holder, name) for holder in holders]
    for holder in holders:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for holder, old in zip(holders, before, strict=True):
            setattr(holder, name, old)
