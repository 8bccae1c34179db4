"""The learning rate of each epoch."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from utils.errors import UserError

WARMUP_METHODS = ("linear", "constant")


@dataclass(frozen=True)
class LearningRateSchedule:
    """Warm-up, then steps; constant within an epoch.

    Attributes:
        base_lr: Rate after the warm-up.
        steps: Epochs, ascending, from which on (inclusive) the rate is multiplied by ``gamma``.
        gamma: Factor of each step.
        warmup_factor: Share of the rate that the warm-up starts from.
        warmup_iters: Epochs below it are warm-up; 0 for none.
        warmup_method: ``linear``: factor f (1 - e/n) + e/n in epoch e of n; ``constant``: factor f.

    Raises:
        UserError: If the method is unknown or the steps do not ascend.
    """

    base_lr: float
    steps: tuple[int, ...]
    gamma: float
    warmup_factor: float
    warmup_iters: int
    warmup_method: str

    def __post_init__(self) -> None:
        """Check what would otherwise give a wrong rate in silence."""
        if self.warmup_method not in WARMUP_METHODS:
            raise UserError(
                f"SOLVER.WARMUP_METHOD is {self.warmup_method!r}; expected one of "
                f"{', '.join(WARMUP_METHODS)}"
            )
        if list(self.steps) != sorted(self.steps):
            raise UserError(f"SOLVER.STEPS is {list(self.steps)}; expected ascending epochs")

    def __call__(self, epoch: int) -> float:
        """Return the rate of an epoch, counted from 1."""
        factor = 1.0
        if epoch < self.warmup_iters:
            progress = epoch / self.warmup_iters if self.warmup_method == "linear" else 0.0
            factor = self.warmup_factor * (1 - progress) + progress
        return self.base_lr * factor * self.gamma ** bisect_right(self.steps, epoch)
