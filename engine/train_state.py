"""How long a training goes, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrainPlan:
    """How long to train and how often to look.

    Attributes:
        max_epochs: SOLVER.MAX_EPOCHS.
        val_period: SOLVER.VAL_PERIOD, epochs; the last epoch is always validated.
        checkpoint_period: SOLVER.CHECKPOINT_PERIOD, epochs; the last epoch is always saved.
        log_period: SOLVER.LOG_PERIOD, iterations.
    """

    max_epochs: int
    val_period: int
    checkpoint_period: int
    log_period: int

    def due(self, epoch: int, period: int) -> bool:
        """Tell whether something with this period happens after ``epoch``."""
        return epoch % period == 0 or epoch == self.max_epochs


@dataclass(frozen=True)
class Best:
    """The best validation so far.

    Attributes:
        epoch: Its epoch; 0 before the first.
        rank1: Rank-1 of raw queries in the protected gallery.
        qualified: Whether it qualified for upgradation; one that did beats every one that did not.
    """

    epoch: int = 0
    rank1: float = -1.0
    qualified: bool = False

    def beaten_by(self, rank1: float, *, qualified: bool) -> bool:
        """Tell whether a validation takes its place."""
        return (qualified, rank1) > (self.qualified, self.rank1)


@dataclass
class TrainState:
    """What changes while training and is neither weights nor optimiser.

    Attributes:
        epoch: Last finished epoch.
        step: Iterations so far, the x axis of every curve.
        best: Best validation so far.
    """

    epoch: int = 0
    step: int = 0
    best: Best = field(default_factory=Best)
