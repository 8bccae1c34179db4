"""Adversarial losses on a discriminator's raw output, real -> 1 and fake -> 0."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from layers.precision import full_precision

GANLoss = Callable[[Tensor, bool], Tensor]


def vanilla_gan_loss(prediction: Tensor, is_real: bool) -> Tensor:
    """Mean binary cross-entropy of logits of any shape against 1 (real) or 0; 0-d float32."""
    with full_precision(prediction):
        logits = prediction.float()
        # -log sigmoid(x) = softplus(-x) and -log(1 - sigmoid(x)) = softplus(x)
        return functional.softplus(-logits if is_real else logits).mean()


def least_squares_gan_loss(prediction: Tensor, is_real: bool) -> Tensor:
    """Mean squared distance of values of any shape to 1 (real) or 0; 0-d float32.

    Source: X. Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017.
    """
    with full_precision(prediction):
        return (prediction.float() - float(is_real)).square().mean()


GAN_LOSSES: dict[str, GANLoss] = {"vanilla": vanilla_gan_loss, "lsgan": least_squares_gan_loss}
