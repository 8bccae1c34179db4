"""OUTPUT_DIR of a training: when checkpoints are saved, and what a resume or restart reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from engine.checkpoint import (
    NATIVE_NAMES,
    CheckpointError,
    read_native,
    save_native,
    save_official,
    training_differences,
)
from engine.distributed.processes import from_main
from modeling.weights import load_matching
from utils.files import write_text


@dataclass(frozen=True)
class TrainPlan:
    """How long to train, and how often to validate, save and log.

    Attributes:
        max_epochs: Number of the last epoch.
        val_period: Epochs between validations; the last epoch is always validated.
        checkpoint_period: Epochs between checkpoints; the last epoch is always saved.
        log_period: Iterations between log lines.
        best_by: Direction (query, gallery) whose rank-1 decides which validation is the best.
    """

    max_epochs: int
    val_period: int
    checkpoint_period: int
    log_period: int
    best_by: tuple[str, str] = ("raw", "protected")

    def due(self, epoch: int, period: int) -> bool:
        """Return whether something with this period happens after ``epoch``."""
        return epoch % period == 0 or epoch == self.max_epochs


@dataclass(frozen=True)
class Best:
    """The best validation so far.

    Attributes:
        epoch: Its epoch; 0 before the first.
        rank1: Its rank-1 in the direction `TrainPlan.best_by`.
        qualified: Whether it qualified for upgradation. A qualified validation is better than any
            that did not qualify.
    """

    epoch: int = 0
    rank1: float = -1.0
    qualified: bool = False

    def beaten_by(self, rank1: float, *, qualified: bool) -> bool:
        """Return whether another validation is better."""
        return (qualified, rank1) > (self.qualified, self.rank1)


@dataclass
class TrainState:
    """The progress of a training, besides weights and optimisers.

    Attributes:
        epoch: Last finished epoch.
        step: Iterations so far; the x axis of every curve.
        best: Best validation so far.
    """

    epoch: int = 0
    step: int = 0
    best: Best = field(default_factory=Best)


class RunFolder:
    """Saves the checkpoints of one training to OUTPUT_DIR, and loads the latest one.

    Args:
        path: OUTPUT_DIR.
        networks: All networks by letter.
        info: Architecture and preprocessing (``engine.model.model_info``), for the native files.
        writes: Whether this process saves; in a distributed run only the first one does.
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
        """Save the latest weights: first the native file, which a resume needs."""
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

    def load_latest(self) -> tuple[int, dict[str, Any]]:
        """Load the networks; return the epoch and the state that ``save_latest`` was given.

        The first process reads the file and sends it to the others, so only it needs the folder.

        Raises:
            CheckpointError: The file is missing or damaged, has another architecture, or belongs
                to a training on other images or identities.
        """
        path = self.path / NATIVE_NAMES["latest"]
        content = from_main(lambda: self._read(path))
        for letter, network in self._networks.items():
            load_matching(network, content["networks"][letter], f"{path} ({letter})")
        return content["epoch"], content["training"]

    def _read(self, path: Path) -> dict[str, Any]:
        content = read_native(self.path, "latest")
        if set(content["networks"]) != set(self._networks):
            raise CheckpointError(
                f"{path} contains networks {', '.join(content['networks'])}; this training "
                f"has {', '.join(self._networks)}"
            )
        differing = training_differences(content["info"], self._info)
        if differing:
            raise CheckpointError(
                f"{path} was trained with {', '.join(differing)}; give the same values to "
                "continue, or choose another output folder"
            )
        return content


_LAUNCH_NAME = ".torchrun"


@dataclass(frozen=True)
class Launch:
    """One launch of torchrun, whose restarts (``--max-restarts``) resume from the last checkpoint.

    A restart must not resume a training that was in OUTPUT_DIR before, and that the first start
    refused to overwrite. So the first start writes a file once it has accepted the folder, and a
    restart resumes only if the file contains the identifier of its launch.

    Attributes:
        path: The file; None if torchrun did not start this process.
        resumes: Whether to resume from the last checkpoint although this was not asked for.
    """

    path: Path | None
    resumes: bool

    @classmethod
    def begin(cls, folder: Path, restarts: int) -> Launch:
        """Return the launch of this process; a first start removes the file of an older launch.

        Args:
            folder: OUTPUT_DIR.
            restarts: How often torchrun has restarted the processes.
        """
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        if run_id is None:
            return cls(None, resumes=False)
        path = folder / _LAUNCH_NAME
        if not restarts:
            path.unlink(missing_ok=True)
            return cls(path, resumes=False)
        accepted = path.is_file() and path.read_text("utf-8") == run_id
        return cls(path, resumes=accepted and (folder / NATIVE_NAMES["latest"]).is_file())

    def accepted(self) -> None:
        """Record that this launch trains in the folder."""
        if self.path is not None:
            write_text(self.path, os.environ["TORCHELASTIC_RUN_ID"])

    @staticmethod
    def finished(folder: Path) -> None:
        """Remove the file once everything is written: the next launch is another run."""
        (folder / _LAUNCH_NAME).unlink(missing_ok=True)
