"""Adversarial losses: their formulas, and properties that each of them must have."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from layers.losses import GAN_LOSSES


@pytest.mark.parametrize("is_real", [True, False])
def test_adversarial_losses(is_real: bool) -> None:
    prediction = 30 * torch.randn(2, 1, 3, 4)
    target = torch.full_like(prediction, float(is_real))
    torch.testing.assert_close(
        GAN_LOSSES["vanilla"](prediction, is_real),
        functional.binary_cross_entropy_with_logits(prediction, target),
    )
    torch.testing.assert_close(
        GAN_LOSSES["lsgan"](prediction, is_real), functional.mse_loss(prediction, target)
    )


@pytest.mark.parametrize("is_real", [True, False])
@pytest.mark.parametrize("name", GAN_LOSSES)
def test_every_loss_is_finite_and_has_a_gradient(name: str, is_real: bool) -> None:
    for size in (0.1, 1.0, 1e3):
        prediction = (size * torch.randn(2, 1, 3, 4)).requires_grad_()
        loss = GAN_LOSSES[name](prediction, is_real)
        assert loss.ndim == 0
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        loss.backward()
        assert prediction.grad is not None
        assert prediction.grad.isfinite().all()
        assert (prediction.grad != 0).any()


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_every_loss_tells_real_from_fake_and_rewards_who_does(name: str) -> None:
    loss = GAN_LOSSES[name]
    sure, unsure = torch.full((2, 1, 3, 4), 0.9), torch.full((2, 1, 3, 4), 0.6)
    assert loss(sure, True) < loss(unsure, True)  # real images, which it calls real
    assert loss(1 - sure, False) < loss(1 - unsure, False)
    assert loss(sure, True) < loss(sure, False)


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_every_loss_is_float32_under_autocast(name: str) -> None:
    prediction = torch.randn(2, 1, 3, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = GAN_LOSSES[name](prediction, True)
    torch.testing.assert_close(loss, GAN_LOSSES[name](prediction.float(), True), rtol=0, atol=0)
