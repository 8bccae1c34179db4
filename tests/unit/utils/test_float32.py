"""Float32 is computed in float32 inside the contexts; outside, the caller's settings hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from utils.device import exact_convolutions, exact_products

PRODUCTS = [lambda: torch.backends.cuda.matmul, lambda: torch.backends.mkldnn.matmul]
CONVOLUTIONS = [lambda: torch.backends.cudnn.conv, lambda: torch.backends.mkldnn.conv]


def _settings() -> list[Any]:
    finders = [*PRODUCTS, *CONVOLUTIONS, lambda: torch.backends.cudnn.rnn, lambda: torch.backends]
    return [find() for find in finders]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    each = [setting.fp32_precision for setting in _settings()]
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = tf32
    for setting, value in reversed(list(zip(_settings(), each, strict=True))):
        setting.fp32_precision = value


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    with pytest.raises(KeyError), exact_products():
        assert all(find().fp32_precision == "ieee" for find in PRODUCTS)
        raise KeyError
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize("setting", [True, False])
def test_convolutions(setting: bool) -> None:
    torch.backends.cudnn.allow_tf32 = setting
    with pytest.raises(KeyError), exact_convolutions():
        assert all(find().fp32_precision == "ieee" for find in CONVOLUTIONS)
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 is setting


@pytest.mark.parametrize(
    ("find", "exact"),
    [(find, exact_products) for find in PRODUCTS]
    + [(find, exact_convolutions) for find in CONVOLUTIONS],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_tf32_chosen_for_one_operation_or_for_all_is_restored(
    find: Callable[[], Any], exact: Callable[[], Any], everywhere: bool
) -> None:
    if everywhere:
        find().fp32_precision = "none"  # the setting of an operation overrides the common one
    (torch.backends if everywhere else find()).fp32_precision = "tf32"
    assert find().fp32_precision == "tf32"
    with exact():
        assert find().fp32_precision == "ieee"
    assert find().fp32_precision == "tf32"


def test_a_setting_that_was_not_made_is_not_made_afterwards() -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"
    with exact_products():
        pass
    assert torch.backends.cuda.matmul.fp32_precision == "none"
