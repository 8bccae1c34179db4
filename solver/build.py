"""Build optimisers and the learning-rate schedule from the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from yacs.config import CfgNode

from solver.optimizers import LearningRateSchedule, Optimizers

GAN_BETAS = (0.5, 0.999)  # of all networks with an adversarial loss
REID_BETAS = (0.9, 0.999)
BETAS = {"G": GAN_BETAS, "G_R": GAN_BETAS, "C": REID_BETAS, "D1": GAN_BETAS, "D2": GAN_BETAS}
DISCRIMINATORS = ("D1", "D2")

FUSED_DEVICES = ("cpu", "cuda")  # with a fused Adam kernel, which gives the same numbers


class HasNetworks(Protocol):
    """Anything with networks by their official letters."""

    @property
    def official_networks(self) -> Mapping[str, nn.Module]:
        """Networks by letter: G, G_R, C, D1, D2, or some of them."""


def build_optimizers(cfg: CfgNode, nets: HasNetworks, centers: nn.Module | None) -> Optimizers:
    """Build Adam for each network and SGD for the centres, with the rates of epoch 1.

    Call it after the networks were moved to their device. Reads SOLVER.{BASE_LR, WEIGHT_DECAY,
    CENTER_LR, CENTER_LOSS_WEIGHT} and the keys of ``build_schedule``.

    Args:
        cfg: The configuration.
        nets: Networks by letter.
        centers: The centre loss (``Objectives.centers``), or None.
    """
    schedule = build_schedule(cfg)
    adams = {
        letter: _adam(network.parameters(), schedule(1), cfg.SOLVER.WEIGHT_DECAY, BETAS[letter])
        for letter, network in nets.official_networks.items()
    }
    return Optimizers(
        main={letter: adam for letter, adam in adams.items() if letter not in DISCRIMINATORS},
        discriminators={letter: adams[letter] for letter in DISCRIMINATORS if letter in adams},
        centers=None if centers is None else SGD(centers.parameters(), lr=cfg.SOLVER.CENTER_LR),
        center_loss_weight=cfg.SOLVER.CENTER_LOSS_WEIGHT,
        schedule=schedule,
    )


def build_schedule(cfg: CfgNode) -> LearningRateSchedule:
    """Build the schedule from SOLVER.{BASE_LR, STEPS, GAMMA, WARMUP_*}."""
    return LearningRateSchedule(
        base_lr=cfg.SOLVER.BASE_LR,
        steps=tuple(cfg.SOLVER.STEPS),
        gamma=cfg.SOLVER.GAMMA,
        warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
        warmup_iters=cfg.SOLVER.WARMUP_ITERS,
        warmup_method=cfg.SOLVER.WARMUP_METHOD,
    )


def _adam(
    parameters: Iterable[nn.Parameter],
    rate: float,
    weight_decay: float,
    betas: tuple[float, float],
) -> Optimizer:
    """Build Adam for the trained parameters; the BNNeck's bias, for example, is not trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    fused = all(
        parameter.device.type in FUSED_DEVICES and torch.is_floating_point(parameter)
        for parameter in trained
    )
    return Adam(trained, lr=rate, betas=betas, weight_decay=weight_decay, fused=fused)
