"""Float32 is float32 inside, and as the caller had it outside, whichever settings he uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from utils.precision import exact_convolutions, exact_products

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
needs_new = pytest.mark.skipif(not NEW, reason="before torch 2.9 there is one setting for all")
PRODUCTS = [lambda: torch.backends.cuda.matmul, lambda: torch.backends.mkldnn.matmul]
CONVOLUTIONS = [lambda: torch.backends.cudnn.conv, lambda: torch.backends.mkldnn.conv]


def _settings() -> list[Any]:
    finders = [*PRODUCTS, *CONVOLUTIONS, lambda: torch.backends.cudnn.rnn, lambda: torch.backends]
    return [find() for find in finders] if NEW else []


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    each = [setting.fp32_precision for setting in _settings()]
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = tf32
    for setting, value in reversed(list(zip(_settings(), each, strict=True))):
        setting.fp32_precision = value


def _products_are_exact() -> bool:
    if NEW:
        return all(find().fp32_precision == "ieee" for find in PRODUCTS)
    return torch.get_float32_matmul_precision() == "highest"


def _convolutions_are_exact() -> bool:
    if NEW:
        return all(find().fp32_precision == "ieee" for find in CONVOLUTIONS)
    return not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    with pytest.raises(KeyError), exact_products():
        assert _products_are_exact()
        raise KeyError
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize("setting", [True, False])
def test_convolutions(setting: bool) -> None:
    torch.backends.cudnn.allow_tf32 = setting
    with pytest.raises(KeyError), exact_convolutions():
        assert _convolutions_are_exact()
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 is setting


@needs_new
@pytest.mark.parametrize(
    ("find", "exact"),
    [(one, exact_products) for one in PRODUCTS]
    + [(one, exact_convolutions) for one in CONVOLUTIONS],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_caller_of_the_new_settings(
    find: Callable[[], Any], exact: Callable[[], Any], everywhere: bool
) -> None:
    """One who chose TF32 for this kind of operation, and one who chose it for all."""
    if everywhere:
        find().fp32_precision = "none"  # what was set for this kind stands above the common choice
    (torch.backends if everywhere else find()).fp32_precision = "tf32"
    assert find().fp32_precision == "tf32"
    with exact():
        assert find().fp32_precision == "ieee"
    assert find().fp32_precision == "tf32"


@needs_new
def test_what_was_not_set_is_not_set_afterwards() -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"
    with exact_products():
        pass
    assert torch.backends.cuda.matmul.fp32_precision == "none"
