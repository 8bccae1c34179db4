"""Experiment trackers: the numbers of a training in Weights & Biases and MLflow.

They receive the configuration and the numbers of ``metrics.jsonl``, and never images, which may
show real people. Their own variables choose project, server and offline mode: ``WANDB_MODE``,
``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from utils.errors import optional_package
from utils.files import write_text
from utils.logger import get_logger

PROJECT = "SecureReID"
RUNS_NAME = "trackers.json"  # ids of the runs, with which a resume continues them
_BATCH = 100  # parameters in one request to MLflow


class Tracker(Protocol):
    """A run in an experiment tracker.

    Attributes:
        run_id: Its identifier, with which a resumed training continues it.
        place: Address or folder of the run.
    """

    run_id: str
    place: str

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send finite numbers of a training step."""

    def close(self, *, failed: bool) -> None:
        """Mark the run as finished or failed."""


class WandbTracker:
    """A run of Weights & Biases; offline, a folder ``wandb`` in the output folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        """Start a run, or continue the run ``run_id``."""
        # Without statistics of the machine, without the terminal's output, and without git.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = package("wandb")
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            id=run_id,
            resume=None if run_id is None else "allow",
            config={name: _plain(value) for name, value in config.items()},
            settings=settings,
        )
        self.run_id = str(self._run.id)
        self.place = str(self._run.dir if self._run.offline else self._run.url)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """A run of MLflow, in the store that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, folder: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        """Start a run, or continue the run ``run_id``."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # The defaults repeat a request for several minutes, in which the training would wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        mlflow = package("mlflow")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        self.place = str(mlflow.get_tracking_uri())
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = (
            self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        )
        self.run_id = str(self._client.create_run(number, run_name=folder.name).info.run_id)
        parameters = [self._entities.Param(key, str(value)) for key, value in config.items()]
        for start in range(0, len(parameters), _BATCH):
            self._client.log_batch(self.run_id, params=parameters[start : start + _BATCH])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers; MLflow refuses ``>``, so ``raw->raw`` becomes ``raw to raw``."""
        now = int(1000 * time.time())  # ms
        metrics = [
            self._entities.Metric(name.replace("->", " to "), value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def package(name: str) -> ModuleType:
    """Import the package of a tracker.

    Raises:
        UserError: It is not installed.
    """
    return optional_package(name, f"RUNTIME.TRACKERS {name}", f"pip install -e '.[{name}]'")


def check_packages(names: Sequence[str]) -> None:
    """Raise unless the packages of all trackers are installed.

    Args:
        names: Values of RUNTIME.TRACKERS.

    Raises:
        UserError: A package is not installed.
    """
    for name in names:
        if name in TRACKERS:
            package(name)


class Trackers:
    """The trackers of a training. One that fails is left out after a warning.

    ``open`` starts the runs: only then must ``close`` end them.

    Args:
        names: Keys of ``TRACKERS``; other names are ignored.
        folder: Output folder of the training.
        config: Configuration values by name.
        resumes: Whether to continue the runs of the training that is resumed.

    Raises:
        UserError: A package is not installed.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: Mapping[str, Any], *, resumes: bool
    ) -> None:
        check_packages(names)
        self._names = [name for name in names if name in TRACKERS]
        self._folder, self._config, self._resumes = folder, config, resumes
        self._trackers: dict[str, Tracker] = {}

    def open(self) -> None:
        """Start the runs, or continue those of the training that is resumed.

        Raises:
            WriteError: The ids of the runs cannot be written.
        """
        path = self._folder / RUNS_NAME
        runs = _recorded_runs(path) if self._resumes else {}
        for name in self._names:
            self._guard(name, self._open, name, runs.get(name))
        opened = {name: tracker.run_id for name, tracker in self._trackers.items()}
        if opened:
            write_text(path, json.dumps(runs | opened) + "\n")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send the finite numbers of a training step to every tracker."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for name, tracker in list(self._trackers.items()):
            self._guard(name, tracker.scalars, finite, step)

    def close(self, *, failed: bool) -> None:
        """Finish all runs."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda each=tracker: each.close(failed=failed))
        self._trackers.clear()

    def _open(self, name: str, run_id: str | None) -> None:
        tracker = TRACKERS[name](self._folder.resolve(), self._config, run_id)
        self._trackers[name] = tracker
        get_logger().info("The run in %s is %s in %s", name, tracker.run_id, tracker.place)

    def _guard(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """Do some work of a tracker; if it fails, log a warning and leave the tracker out."""
        try:
            work(*arguments)
        except Exception as error:  # of a foreign package: any class
            self._trackers.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            get_logger().warning(
                "%s failed and receives no more numbers, metrics.jsonl is complete: %s",
                name, reason,
            )  # fmt: skip


def _plain(value: object) -> object:
    """Return a value that JSON has; anything else as text."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if isinstance(value, (bool, int, float, str)) and is_finite else str(value)


def _recorded_runs(path: Path) -> dict[str, str]:
    """Return the ids of earlier runs by tracker; empty if the file is missing or damaged."""
    try:
        return {str(name): str(run) for name, run in json.loads(path.read_text("utf-8")).items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}
