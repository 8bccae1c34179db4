"""How long a training goes, and how far it has come.

OUTPUT_DIR of a training: what is saved when, and what a resume reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from engine.checkpoint import (
    NATIVE_NAMES,
    CheckpointError,
    read_native,
    run_differences,
    save_native,
    save_official,
    training_in,
)
from engine.distributed.processes import from_main
from modeling.weights import load_matching


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


class RunFolder:
    """OUTPUT_DIR of one training: what is saved when, and what a resume reads.

    Args:
        path: OUTPUT_DIR.
        networks: All networks by letter.
        info: Architecture and preprocessing, kept in the native files.
        writes: Whether this process saves; of several processes only the first does.
    """

    def __init__(
        self,
        path: Path,
        networks: Mapping[str, nn.Module],
        info: Mapping[str, Any],
        *,
        writes: bool = True,
    ) -> None:
        self.path, self.writes = path, writes
        self._networks = dict(networks)
        self._info = dict(info)

    def save_latest(self, epoch: int, training: Mapping[str, Any]) -> None:
        """Save the native file first: it is the one that a resume needs."""
        if not self.writes:
            return
        save_native(self.path, "latest", self._networks, epoch, self._info, training)
        save_official(self.path, "latest", self._networks)

    def save_best(self, epoch: int, record: Mapping[str, Any]) -> None:
        """Save the weights of the best validation, with its numbers."""
        if not self.writes:
            return
        info = self._info | {"best": dict(record)}
        save_native(self.path, "best", self._networks, epoch, info)
        save_official(self.path, "best", self._networks)

    def refuse_overwriting(self) -> None:
        """Raise if a run is there already: a new one must not overwrite it.

        Raises:
            CheckpointError: If OUTPUT_DIR holds checkpoints, native or official.
        """
        path = training_in(self.path)
        if path is not None:
            raise CheckpointError(
                f"{path} exists: OUTPUT_DIR holds a training already; continue it with "
                "SOLVER.RESUME True, or choose another OUTPUT_DIR"
            )

    def load_latest(self) -> tuple[int, dict[str, Any]]:
        """Load the networks; returns the epoch and what ``save_latest`` was given.

        The first process reads for all: only it needs the folder, and all resume from one point.

        Raises:
            CheckpointError: If the file is missing, damaged, of another architecture, or of a
                training on other images or people.
        """
        path = self.path / NATIVE_NAMES["latest"]
        content = from_main(lambda: self._read(path))
        for letter, network in self._networks.items():
            load_matching(network, content["networks"][letter], f"{path} ({letter})")
        return content["epoch"], content["training"]

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise CheckpointError(
                f"SOLVER.RESUME is True, but {path} does not exist; expected the OUTPUT_DIR of an "
                "interrupted training (leave SOLVER.RESUME out to start one)"
            )
        content = read_native(self.path, "latest")
        if set(content["networks"]) != set(self._networks):
            raise CheckpointError(
                f"{path} holds networks {', '.join(content['networks'])}; this MODEL.MODE trains "
                f"{', '.join(self._networks)}"
            )
        differing = run_differences(content["info"], self._info)
        if differing:
            raise CheckpointError(
                f"{path} was trained with {', '.join(differing)}; give the same values to go on, "
                "or choose another OUTPUT_DIR"
            )
        return content
