"""Losses give golden values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layers.losses import (
    GAN_LOSSES,
    CenterLoss,
    batch_hard_triplet_loss,
    weighted_regularized_triplet_loss,
)
from modeling.objectives import Objectives, reid_losses
from modeling.reid_network import ReIDOutput, ReIDPair
from tests.fixtures.golden import golden_arrays

Values = dict[str, Tensor]


def center(values: Values) -> Tensor:
    loss = CenterLoss(8, 64)
    loss.load_state_dict({"centers": values["centers"]})
    return loss(values["feat"], values["target"])


def cross_entropy(values: Values) -> Tensor:
    objectives = Objectives(
        triplet=weighted_regularized_triplet_loss, label_smoothing=0.1, centers=None,
        gan=GAN_LOSSES["vanilla"], weights={},
    )  # fmt: skip
    seen = ReIDOutput(logits=values["scores"], feature=values["feat"], embedding=values["feat"])
    losses = reid_losses(ReIDPair(seen, None), values["target"], objectives)
    return losses["reid_raw_cross_entropy"]


CASES: dict[str, Callable[[Values], Tensor]] = {
    "weighted_regularized_triplet": lambda v: weighted_regularized_triplet_loss(
        v["feat"], v["target"]
    ),
    "weighted_regularized_triplet_normalized": lambda v: weighted_regularized_triplet_loss(
        v["feat"], v["target"], normalized=True
    ),
    "batch_hard_triplet_margin_0.3": lambda v: batch_hard_triplet_loss(
        v["feat"], v["target"], margin=0.3
    ),
    "center": center,
    "cross_entropy_label_smooth_0.1": cross_entropy,
    "gan_real": lambda v: GAN_LOSSES["vanilla"](v["gan_pred"], True),
    "gan_fake": lambda v: GAN_LOSSES["vanilla"](v["gan_pred"], False),
    "lsgan_real": lambda v: GAN_LOSSES["lsgan"](v["gan_pred"], True),
    "lsgan_fake": lambda v: GAN_LOSSES["lsgan"](v["gan_pred"], False),
}


@pytest.mark.parametrize("name", CASES)
def test_loss(name: str) -> None:
    values = golden_arrays("losses.npz")
    value = CASES[name](values)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(values[name].item(), rel=1e-5)


def test_every_golden_value_is_checked() -> None:
    inputs = {"feat", "target", "scores", "centers", "gan_pred"}
    assert set(CASES) == set(golden_arrays("losses.npz")) - inputs
