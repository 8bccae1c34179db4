"""Metrics of a training over time: ``metrics.jsonl``, TensorBoard and experiment trackers.

Trackers (Weights & Biases, MLflow) receive the configuration and the numbers of ``metrics.jsonl``,
and never images, which may show real people. Their own variables choose project, server and
offline mode: ``WANDB_MODE``, ``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``,
``MLFLOW_EXPERIMENT_NAME``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.errors import UserError, first_line, optional_package
from utils.files import WriteError, ensure_folder, write_text
from utils.logger import get_logger

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

PROJECT = "SecureReID"
RUNS_NAME = "trackers.json"  # ids of the trackers' runs, with which a resume continues them
_BATCH = 100  # parameters in one request to MLflow


@dataclass
class MetricWriter:
    """Writes scalars and images under names such as ``loss/triplet`` or ``eval/mAP``.

    Each call adds one line to ``metrics.jsonl``:
    ``{"epoch": 3, "step": 555, "loss/triplet": 0.41}``. A resumed run first removes the lines after
    the epoch that it resumes from, so that no epoch is recorded twice.
    """

    output_dir: str | Path  # the folder, created if necessary
    _: KW_ONLY
    # Last finished epoch of the run that is resumed; later lines are removed. None for a new run,
    # which appends to existing lines.
    resume_epoch: int | None = None
    resume_step: int | None = None  # steps done at that epoch; TensorBoard hides later points
    tensorboard: bool = True  # whether to write ``runs/``
    # Further recipients of the numbers, opened when the `with` block begins. After a resume they
    # receive no step again but the last one, since a kill may have cut its numbers.
    trackers: Trackers | None = None

    def __post_init__(self) -> None:
        summary_writer = _summary_writer() if self.tensorboard else None
        self._folder = folder = ensure_folder(self.output_dir)
        path, self._sent_step = folder / "metrics.jsonl", 0
        if self.resume_epoch is not None:
            self._sent_step = max((line.get("step", 0) for line in read_metrics(path)), default=0)
            _drop_later_lines(path, self.resume_epoch)
        purge_step = None if self.resume_step is None else self.resume_step + 1
        with self._guarded():
            _end_with_newline(path)
            # Unbuffered, so that a line that failed on a full disk is not written again on closing.
            self._lines = path.open("ab", buffering=0)
            self._board: SummaryWriter | None = None
            try:
                if summary_writer is not None:
                    self._board = summary_writer(str(folder / "runs"), purge_step=purge_step)
            except UnicodeEncodeError:
                get_logger().warning(
                    "TensorBoard cannot write to %s, whose name is not UTF-8; curves are written "
                    "to metrics.jsonl only", folder,
                )  # fmt: skip
        self._thread_hook = threading.excepthook
        threading.excepthook = self._hide_tensorboard

    def scalars(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Write metrics of one training step; raise a WriteError if the device is full.

        Args:
            values: Numbers by name; a non-finite number becomes null in the file.
            epoch: Epoch, from 1.
            step: Training steps so far, over all epochs.
        """
        record: dict[str, Any] = {"epoch": epoch, "step": step}
        record |= {n: float(v) if math.isfinite(v) else None for n, v in values.items()}
        line = memoryview((json.dumps(record, allow_nan=False) + "\n").encode("utf-8"))
        with self._guarded():
            while line:
                line = line[self._lines.write(line) :]
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            if self.trackers is not None and step >= self._sent_step:
                self.trackers.scalars(values, step)

    def picture(self, name: str, image: Tensor, *, step: int) -> None:
        """Write an image to TensorBoard: uint8, or float in [0, 1], of shape (3, H, W)."""
        if self._board is not None:
            with self._guarded():
                self._board.add_image(name, image, step)

    def flush(self) -> None:
        """Make the lines of metrics.jsonl survive a power cut, and pass on those of TensorBoard."""
        with self._guarded():
            os.fsync(self._lines.fileno())
            if self._board is not None:
                self._board.flush()

    def close(self, *, failed: bool = False) -> None:
        """Write the rest, and close the files; trackers mark the run as finished or failed."""
        self._lines.close()
        try:
            if self._board is not None:
                with self._guarded():
                    self._board.close()
        finally:
            threading.excepthook = self._thread_hook
            if self.trackers is not None:
                self.trackers.close(failed=failed)

    def _hide_tensorboard(self, failure: threading.ExceptHookArgs) -> None:
        """Do not print the traceback of TensorBoard's thread.

        The next call of this writer raises the error as one sentence.
        """
        is_tensorboard = type(failure.thread).__module__.startswith("tensorboard")
        if not (is_tensorboard and isinstance(failure.exc_value, OSError)):
            self._thread_hook(failure)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Raise a failed write as one sentence; hold interrupts, as TensorBoard uses locks."""
        try:
            with interrupts_held():
                yield
        except OSError as error:
            raise WriteError(
                f"cannot write in {self._folder}: {error.strerror or error}; free some space or "
                "choose another output folder"
            ) from error

    def __enter__(self) -> MetricWriter:
        # Trackers are opened last: a training that cannot start must not leave their runs open.
        try:
            if self.trackers is not None:
                self.trackers.open()
        except BaseException:
            self.close(failed=True)
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        try:
            self.close(failed=error is not None)
        except WriteError:
            if error is None:  # otherwise the first error is the cause
                raise


def _summary_writer() -> type[SummaryWriter]:
    """Return TensorBoard's writer; its import takes seconds."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - for trainings only
    except ImportError as error:
        raise UserError(
            f"a training needs the package tensorboard ({error}); run `pip install -r "
            "requirements.txt`, or leave tensorboard out of RUNTIME.TRACKERS"
        ) from error
    return SummaryWriter


class SilentWriter:
    """A :class:`MetricWriter` that writes nothing, for all ranks but 0."""

    def scalars(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Do nothing."""

    def picture(self, name: str, image: Tensor, *, step: int) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def __enter__(self) -> SilentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a ``metrics.jsonl``, without lines that a fault has damaged."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return [record for line in lines if (record := _parse(line))]


def _drop_later_lines(path: Path, epoch: int) -> None:
    """Remove the lines after ``epoch``, and damaged ones."""
    if not path.is_file():
        return
    lines = path.read_text("utf-8", errors="replace").splitlines()
    kept = [line for line in lines if (record := _parse(line)) and record.get("epoch", 0) <= epoch]
    if len(kept) != len(lines):
        write_text(path, "".join(f"{line}\n" for line in kept))


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Deliver a SIGINT that arrives inside the block at its end.

    Python raises KeyboardInterrupt between any two instructions, also between acquiring a lock and
    entering the block that releases it; the next user of that lock waits forever. Hold interrupts
    around short calls of code that shares locks with its own threads.

    Outside the main thread, which alone receives signals, this does nothing. An error of the block
    replaces the interrupt, since it ends the program anyway.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        before(*received[-1])


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _end_with_newline(path: Path) -> None:
    """End a line that a kill has cut, so that the next record starts a new line."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


class Tracker(NamedTuple):
    """A run in an experiment tracker."""

    run_id: str  # its identifier, with which a resumed training continues it
    place: str  # its address or folder
    scalars: Callable[[Mapping[str, float], int], None]  # sends finite numbers of a training step
    close: Callable[..., None]  # ends it; ``failed`` is whether the training has failed


def _wandb_run(folder: Path, config: Mapping[str, Any], run_id: str | None) -> Tracker:
    """Start or continue a run of Weights & Biases; offline, a folder ``wandb`` in ``folder``."""
    # Without statistics of the machine, without the terminal's output, and without git.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb = package("wandb")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        dir=str(folder),
        id=run_id,
        resume=None if run_id is None else "allow",
        config={name: _plain(value) for name, value in config.items()},
        settings=wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True
        ),
    )
    return Tracker(
        str(run.id),
        str(run.dir if run.offline else run.url),
        scalars=lambda values, step: run.log(dict(values), step=step),
        close=lambda failed: run.finish(exit_code=int(failed)),
    )


def _mlflow_run(folder: Path, config: Mapping[str, Any], run_id: str | None) -> Tracker:
    """Start or continue a run of MLflow, in the store that ``MLFLOW_TRACKING_URI`` names."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # The defaults repeat a request for several minutes, in which the training would wait.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    mlflow = package("mlflow")
    entities, client = mlflow.entities, mlflow.MlflowClient()
    if run_id is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        run_id = str(client.create_run(number, run_name=folder.name).info.run_id)
        parameters = [entities.Param(key, str(value)) for key, value in config.items()]
        for start in range(0, len(parameters), _BATCH):
            client.log_batch(run_id, params=parameters[start : start + _BATCH])
    else:
        client.update_run(run_id, status="RUNNING")

    def scalars(values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())  # ms
        metrics = [  # MLflow refuses ``>``
            entities.Metric(name.replace("->", " to "), value, now, step)
            for name, value in values.items()
        ]
        client.log_batch(run_id, metrics=metrics)

    def close(*, failed: bool) -> None:
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    return Tracker(run_id, str(mlflow.get_tracking_uri()), scalars, close)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": _wandb_run,
    "mlflow": _mlflow_run,
}


def package(name: str) -> ModuleType:
    """Import the package of a tracker; raise a UserError if it is not installed."""
    return optional_package(name, f"RUNTIME.TRACKERS {name}", f"pip install -e '.[{name}]'")


def check_packages(names: Sequence[str]) -> None:
    """Raise unless the packages of all trackers are installed."""
    for name in names:
        if name in TRACKERS:
            package(name)


@dataclass
class Trackers:
    """The trackers of a training. One that fails is left out after a warning.

    ``open`` starts the runs: only then must ``close`` end them.

    Raises:
        UserError: A package is not installed.
    """

    names: Sequence[str]  # keys of ``TRACKERS``; other names are ignored
    folder: Path  # output folder of the training
    config: Mapping[str, Any]  # configuration values by name
    resumes: bool  # whether to continue the runs of the training that is resumed

    def __post_init__(self) -> None:
        check_packages(self.names)
        self._trackers: dict[str, Tracker] = {}

    def open(self) -> None:
        """Start the runs, or continue those of the training that is resumed.

        Raises:
            WriteError: The ids of the runs cannot be written.
        """
        path = self.folder / RUNS_NAME
        runs = _recorded_runs(path) if self.resumes else {}
        for name in (name for name in self.names if name in TRACKERS):
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
        tracker = TRACKERS[name](self.folder.resolve(), self.config, run_id)
        self._trackers[name] = tracker
        get_logger().info("The run in %s is %s in %s", name, tracker.run_id, tracker.place)

    def _guard(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """Do some work of a tracker; if it fails, log a warning and leave the tracker out."""
        try:
            work(*arguments)
        except Exception as error:  # of a foreign package: any class
            self._trackers.pop(name, None)
            get_logger().warning(
                "%s failed and receives no more numbers, metrics.jsonl is complete: %s",
                name, first_line(error),
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
