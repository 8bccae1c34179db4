"""Optimisers of a training run, stepped in groups, and the learning rate of each epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from yacs.config import CfgNode

from utils.errors import UserError

GAN_BETAS = (0.5, 0.999)  # of all networks with an adversarial loss
REID_BETAS = (0.9, 0.999)
BETAS = {"G": GAN_BETAS, "G_R": GAN_BETAS, "C": REID_BETAS, "D1": GAN_BETAS, "D2": GAN_BETAS}
DISCRIMINATORS, CENTERS = ("D1", "D2"), "centers"

FUSED_DEVICES = ("cpu", "cuda")  # with a fused Adam kernel, which gives the same numbers


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rate by epoch: warm-up, then steps; constant within an epoch."""

    base_lr: float  # rate after the warm-up
    # ascending epochs; from each of them on the rate is multiplied by ``gamma``
    steps: tuple[int, ...]
    gamma: float  # factor of each step
    warmup_factor: float  # factor f of the rate at the start of the warm-up
    warmup_iters: int  # number n; epochs below n are warm-up; 0 for none
    warmup_method: str  # ``linear``: factor f (1 - e/n) + e/n in epoch e; ``constant``: factor f

    def __call__(self, epoch: int) -> float:
        """Return the rate of an epoch, counted from 1."""
        factor = 1.0
        if epoch < self.warmup_iters:
            progress = epoch / self.warmup_iters if self.warmup_method == "linear" else 0.0
            factor = self.warmup_factor * (1 - progress) + progress
        return self.base_lr * factor * self.gamma ** bisect_right(self.steps, epoch)


@dataclass(eq=False)
class Optimizers:
    """Optimisers, stepped in groups: the discriminators, and everything else."""

    # by letter of the network (G, G_R, C, D1, D2; baseline: C only), and that of the identity
    # centres, if there is a centre loss, as ``centers``
    by_name: dict[str, Optimizer]
    # Weight of the centre loss in the sum, above 0. The centres' gradient is divided by it, so that
    # their learning rate does not depend on it.
    center_loss_weight: float
    schedule: LearningRateSchedule  # learning rate of each epoch, for all but the centres

    @property
    def main(self) -> list[Optimizer]:
        """Optimisers of anonymizer, recovery and re-ID network."""
        others = (*DISCRIMINATORS, CENTERS)
        return [optimizer for name, optimizer in self.by_name.items() if name not in others]

    @property
    def discriminators(self) -> list[Optimizer]:
        """Optimisers of D1 and D2; empty for the baseline."""
        return [self.by_name[name] for name in DISCRIMINATORS if name in self.by_name]

    @property
    def centers(self) -> Optimizer | None:
        """Optimiser of the identity centres."""
        return self.by_name.get(CENTERS)

    def zero_grad(self) -> None:
        """Delete all gradients."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none=True)

    def step_main(self) -> None:
        """Update anonymizer, recovery, re-ID network and centres, then delete gradients."""
        _step(self.main)
        if self.centers is not None:
            for parameter in (p for group in self.centers.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad.div_(self.center_loss_weight)
            _step([self.centers])

    def step_discriminators(self) -> None:
        """Update both discriminators, then delete their gradients."""
        _step(self.discriminators)

    def state_dict(self) -> dict[str, Any]:
        """Return every optimiser's state by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`: moments and step counts.

        Weight decay, betas and rates stay those of this run, so that a value that was changed
        before resuming is used.

        Raises:
            UserError: The state belongs to other optimisers.
        """
        own = self.by_name
        if set(state) != set(own):
            raise UserError(
                f"the checkpoint has optimisers of {', '.join(sorted(state)) or 'nothing'}; this "
                f"run has {', '.join(sorted(own))}: resume with the mode and losses of the "
                "checkpoint"
            )
        for name, optimizer in own.items():
            options = [
                {name: value for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ]
            try:
                optimizer.load_state_dict(state[name])
            except (ValueError, KeyError) as error:
                raise UserError(
                    f"the checkpoint's optimiser of {name} does not fit this run ({error}): resume "
                    "with the configuration it was trained with"
                ) from error
            for group, chosen in zip(optimizer.param_groups, options, strict=True):
                group.update(chosen)
            _lay_out_moments(optimizer)


def _step(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _lay_out_moments(optimizer: Optimizer) -> None:
    """Convert Adam's moments to the memory format of their parameters.

    The format may have changed between two runs. The fused kernel reads parameters and moments in
    the order of memory: on a CPU it would silently use the moments of other weights; on a GPU it
    raises.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_learning_rate(optimizers: Optimizers, epoch: int) -> float:
    """Set the rate of an epoch (from 1) in all optimisers but that of the centres; return it."""
    rate = optimizers.schedule(epoch)
    for optimizer in optimizers.main + optimizers.discriminators:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate


def build_optimizers(
    cfg: CfgNode, networks: Mapping[str, nn.Module], centers: nn.Module | None
) -> Optimizers:
    """Build Adam for each trained network and SGD for the centres, with the rates of epoch 1.

    Networks are given by letter. Call it after they were moved to their device. Reads
    SOLVER.{BASE_LR, WEIGHT_DECAY, CENTER_LR, CENTER_LOSS_WEIGHT} and the keys of
    ``build_schedule``.
    """
    schedule = build_schedule(cfg)
    by_name = {
        letter: _adam(network.parameters(), schedule(1), cfg.SOLVER.WEIGHT_DECAY, BETAS[letter])
        for letter, network in networks.items()
        if any(parameter.requires_grad for parameter in network.parameters())
    }
    if centers is not None:
        by_name[CENTERS] = SGD(centers.parameters(), lr=cfg.SOLVER.CENTER_LR)
    return Optimizers(by_name, cfg.SOLVER.CENTER_LOSS_WEIGHT, schedule)


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
    parameters: Iterable[nn.Parameter], rate: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """Build Adam for the trained parameters; the BNNeck's bias, for example, is not trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in trained)
    return Adam(trained, lr=rate, betas=betas, weight_decay=weight_decay, fused=fused)
