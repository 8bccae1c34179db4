"""Float32 is float32 inside, and as the caller had it outside, whichever settings he uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from utils.float32 import exact_convolutions, exact_products

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
needs_new = pytest.mark.skipif(not NEW, reason="before torch 2.9 there is one setting for all")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    with pytest.raises(KeyError), exact_products():
        assert not torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize("setting", [True, False])
def test_convolutions(setting: bool) -> None:
    torch.backends.cudnn.allow_tf32 = setting
    with pytest.raises(KeyError), exact_convolutions():
        assert not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 is setting


@needs_new
@pytest.mark.parametrize(
    ("find", "exact"),
    [
        (lambda: torch.backends.cuda.matmul, exact_products),
        (lambda: torch.backends.cudnn.conv, exact_convolutions),
    ],
)
def test_a_caller_of_the_new_settings(find: Callable[[], Any], exact: Callable[[], Any]) -> None:
    kind = find()
    torch.set_float32_matmul_precision("highest")
    before = kind.fp32_precision
    kind.fp32_precision = "ieee" if before == "tf32" else "tf32"
    chosen = kind.fp32_precision
    try:
        with pytest.raises(RuntimeError, match="new API|different TF32 flags"):
            torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        with exact():
            assert kind.fp32_precision == "ieee"
        assert kind.fp32_precision == chosen
    finally:
        kind.fp32_precision = before
