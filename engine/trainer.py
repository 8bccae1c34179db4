"""The training loop: train an epoch, validate, upgrade, save, in the order of the method.

The loop stops a run whose losses or weights are NaN or infinite. A batch with such losses is saved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from data.loaders import TrainLoader
from data.records import Batch
from engine.checkpoint import RunFolder
from engine.distributed.processes import world
from engine.report import EvalReport
from engine.supervision import Supervision
from engine.train_step import StepOutput, TrainStep, step_that_fits
from engine.views import as_tensor, save_image
from modeling.reid_network import LossDict
from solver.optimizers import Optimizers, set_learning_rate
from utils.errors import UserError
from utils.files import WriteError
from utils.logger import Progress, get_logger
from utils.metric_writer import MetricWriter, SilentWriter
from utils.seeding import derive_seed, seed_everything
from utils.tensor_files import save_tensors

_LOGGER = get_logger()


@dataclass(frozen=True)
class TrainPlan:
    """How long to train, and how often to validate, save and log."""

    max_epochs: int  # number of the last epoch
    val_period: int  # epochs between validations; the last epoch is always validated
    checkpoint_period: int  # epochs between checkpoints; the last epoch is always saved
    log_period: int  # iterations between log lines
    # Direction (query, gallery) whose rank-1 decides which validation is the best. None: re-ID is
    # not trained, and the last validation counts as the best.
    best_by: tuple[str, str] | None = ("raw", "protected")

    def due(self, epoch: int, period: int) -> bool:
        """Return whether something with this period happens after ``epoch``."""
        return epoch % period == 0 or epoch == self.max_epochs


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    epoch: int = 0  # its epoch; 0 before the first
    # Its rank-1 in the direction `TrainPlan.best_by`; raw -> protected if that is None.
    rank1: float = -1.0
    # Whether it qualified for upgradation. A qualified validation is better than any that did not
    # qualify.
    qualified: bool = False

    def beaten_by(self, rank1: float, *, qualified: bool) -> bool:
        """Return whether another validation is better."""
        return (qualified, rank1) > (self.qualified, self.rank1)


@dataclass
class TrainState:
    """The progress of a training, besides weights and optimisers."""

    epoch: int = 0  # last finished epoch
    step: int = 0  # iterations so far; the x axis of every curve
    best: Best = field(default_factory=Best)  # best validation so far


@dataclass(frozen=True)
class ValidationRun:
    """How a training is validated."""

    # returns the report of the validation split; takes the epoch of the weights
    evaluate: Callable[[int], EvalReport]
    # returns an image grid of a few identities, with a column for every kind of image; None if no
    # images are written
    draw: Callable[[], Image.Image] | None


@dataclass
class Trainer:
    """One training; :meth:`fit` is the loop."""

    step: TrainStep  # one optimisation step, of the joint model or of the baseline
    # all networks that are trained; set to training mode at the start of an epoch
    networks: nn.Module
    centers: nn.Module  # identity centres of the centre loss
    loader: TrainLoader  # training batches
    optimizers: Optimizers  # optimisers of the networks and of the centres
    supervision: Supervision  # returns the anonymization target, and upgrades it
    plan: TrainPlan  # how long to train, and how often to validate, save and log
    folder: RunFolder  # saves checkpoints
    writer: MetricWriter | SilentWriter  # TensorBoard and ``metrics.jsonl``
    # scores and draws the validation split; None without such a split
    validation: ValidationRun | None
    state: TrainState = field(default_factory=TrainState)  # progress of the training
    saves_images: bool = True  # whether images of the data set may be written to the output folder

    def fit(self) -> EvalReport | None:
        """Train to the last epoch; return the report of the last validation, if any."""
        report = None
        with self.writer:
            # Saved before the first epoch and after resuming. So a run that is killed at any time
            # can be resumed, files missing after a kill are written, and a full disk is found
            # before the first epoch.
            self.folder.save_latest(self.state.epoch, self.training_state())
            for epoch in range(self.state.epoch + 1, self.plan.max_epochs + 1):
                self._train_epoch(epoch)
                if self.validation is not None and self.plan.due(epoch, self.plan.val_period):
                    report = self._validate(epoch, self.validation)
                self.state.epoch = epoch
                if self.plan.due(epoch, self.plan.checkpoint_period):
                    self.writer.flush()  # a checkpoint must not be newer than its metrics
                    self.folder.save_latest(epoch, self.training_state())
        return report

    def _train_epoch(self, epoch: int) -> None:
        # Layers that drop features at random, as in some timm models, have no generator of their
        # own. So the numbers of an epoch are the same after a resume, and differ between processes.
        seed_everything(derive_seed(self.loader.seed, "networks", epoch, world().rank))
        rate = set_learning_rate(self.optimizers, epoch)
        self.networks.train()
        self.loader.set_epoch(epoch)
        guard = LossGuard(self.folder.path, with_images=self.saves_images)
        meter, num_images = _Meter(), 0
        with Progress(self.loader.num_images, f"Epoch {epoch}") as bar:
            for iteration, batch in enumerate(self.loader, start=1):
                output = self._step(batch)
                self.state.step += 1
                num_images += len(batch)
                guard.observe(output.losses, batch, self.state.step)
                meter.add(output)
                bar.update(len(batch))
                if iteration % self.plan.log_period == 0 or iteration == len(self.loader):
                    self._log(epoch, iteration, rate, meter.average())
                    meter = _Meter()
            guard.check()
            seconds = bar.elapsed_s
        self._check_weights()
        speed = num_images / seconds
        self.writer.scalars({"speed/images_per_s": speed}, epoch=epoch, step=self.state.step)
        _LOGGER.info(
            "Epoch %d done. Time per batch: %.3f[s] Speed: %.1f[samples/s]",
            epoch, seconds / len(self.loader), speed,
        )  # fmt: skip

    def _check_weights(self) -> None:
        """Raise if a weight is NaN or infinite: finite losses do not show what the update did."""
        states = (*self.networks.state_dict().values(), *self.centers.state_dict().values())
        finite = [state.isfinite().all() for state in states]
        if not torch.stack(finite).all():
            raise NonFiniteError(
                f"weights are no longer finite after step {self.state.step}; the last checkpoint "
                "is unchanged"
            )

    def _step(self, batch: Batch) -> StepOutput:
        sampler = self.loader.sampler
        return step_that_fits(
            self.step,
            batch,
            num_instances=sampler.num_instances,
            clean=self.optimizers.zero_grad,
            alone=sampler.world_size == 1,
        )

    def _log(self, epoch: int, iteration: int, rate: float, average: dict[str, float]) -> None:
        _LOGGER.info(
            "Epoch[%d] Iteration[%d/%d] Loss: %.3f, Acc: %.3f, Base Lr: %.2e",
            epoch, iteration, len(self.loader), average["total"], average["accuracy"], rate,
        )  # fmt: skip
        numbers = {f"loss/{name}": value for name, value in average.items() if name != "accuracy"}
        numbers |= {"train/accuracy": average["accuracy"], "train/learning_rate": rate}
        self.writer.scalars(numbers, epoch=epoch, step=self.state.step)

    def _validate(self, epoch: int, validation: ValidationRun) -> EvalReport:
        report = validation.evaluate(epoch)
        if self.folder.writes and validation.draw is not None:
            grid = validation.draw()
            save_image(grid, self.folder.path / "pictures" / f"epoch_{epoch:03d}.png")
            self.writer.picture("pictures", as_tensor(grid), step=self.state.step)
        for line in report.log_lines():
            _LOGGER.info(line)
        _LOGGER.info("\n%s", report.table())
        can_upgrade, qualified = False, False
        if self.step.anonymizer is not None and self.supervision.policy.enabled:
            self.supervision.update(report.validation, epoch, self.step.anonymizer)
            can_upgrade, qualified = True, self.supervision.policy.qualifies(report.validation)
        upgrade = {f"upgrade/{k}": float(v) for k, v in asdict(self.supervision.state).items()}
        self.writer.scalars(report.scalars() | upgrade, epoch=epoch, step=self.state.step)
        row = report.row(*(self.plan.best_by or ("raw", "protected")))
        if self.plan.best_by is None or self.state.best.beaten_by(row.rank1, qualified=qualified):
            self.state.best = Best(epoch, row.rank1, qualified)
            record = asdict(self.state.best) | {"can_qualify": can_upgrade}
            self.folder.save_best(epoch, record)
            if self.plan.best_by is not None:
                _LOGGER.info(
                    "Best so far: epoch %d, %s rank-1 %.1f%%%s",
                    epoch, row.name, 100 * row.rank1,
                    " (not qualified for upgradation)" * (can_upgrade and not qualified),
                )  # fmt: skip
        return report

    def training_state(self) -> dict[str, Any]:
        """Return what a resume needs in addition to the networks."""
        return {
            "optimizers": self.optimizers.state_dict(),
            "centers": self.centers.state_dict(),
            "supervision": self.supervision.state_dict(),
            "step": self.state.step,
            "best": asdict(self.state.best),
        }

    def restore(self, epoch: int, saved: dict[str, Any]) -> None:
        """Continue after ``epoch`` from the values of ``training_state``.

        Networks and optimisers have been loaded before, and anything that does not fit refused.
        """
        if epoch:  # learning rates are not part of the loaded state
            set_learning_rate(self.optimizers, epoch)
        self.centers.load_state_dict(saved["centers"])
        self.supervision.load_state_dict(saved["supervision"], self.step.anonymizer)
        best = Best(**saved["best"])
        # Without upgradation no later validation could qualify, so none would be better.
        best = replace(best, qualified=best.qualified and self.supervision.policy.enabled)
        self.state = TrainState(epoch, saved["step"], best)
        _LOGGER.info("Resumed after epoch %d of %d", epoch, self.plan.max_epochs)


class _Meter:
    """Averages of the numbers of several steps; the host waits for the device in `average` only."""

    def __init__(self) -> None:
        self._sums: LossDict = {}
        self._steps = 0

    def add(self, output: StepOutput) -> None:
        """Add the numbers of one step."""
        for name, value in output.numbers().items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def average(self) -> dict[str, float]:
        """Return the averages."""
        values = torch.stack([value.float() for value in self._sums.values()]) / self._steps
        return dict(zip(self._sums, values.tolist(), strict=True))


class NonFiniteError(UserError):
    """A loss or a weight became NaN or infinite."""

    exit_code = 1


class _Pending(NamedTuple):
    names: tuple[str, ...]
    values: Tensor
    batch: Batch
    step: int
    arrived: torch.cuda.Event | None


class LossGuard:
    """Checks the losses of every step without a synchronisation of host and device.

    On CUDA the losses are copied to the host asynchronously and checked a few steps later, while
    the device still has work queued. The check may lag ``depth`` steps behind. Their batches are
    kept, so the batch at fault is known. On the CPU the losses are checked at once.

    The batch at fault is saved in ``folder``, as ``nan_batch.pth``.
    """

    def __init__(self, folder: Path, depth: int = 4, *, with_images: bool = True) -> None:
        self._folder, self._depth, self._with_images = folder, depth, with_images
        self._pending: deque[_Pending] = deque()

    @torch.no_grad()
    def observe(self, losses: LossDict, batch: Batch, step: int) -> None:
        """Queue the losses of one step; raise a NonFiniteError if a due one is not finite."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        arrived = None
        if values.is_cuda:
            stream = torch.cuda.current_stream(values.device)  # the current GPU may be another one
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        self._pending.append(_Pending(tuple(losses), values, batch, step, arrived))
        self._settle(keep=0 if arrived is None else self._depth)

    def check(self) -> None:
        """Check all queued losses; called before anything is saved."""
        self._settle(keep=0)

    def _settle(self, keep: int) -> None:
        while len(self._pending) > keep:
            due = self._pending.popleft()
            if due.arrived is not None:
                due.arrived.synchronize()
            values = dict(zip(due.names, due.values.tolist(), strict=True))
            bad = {name: value for name, value in values.items() if not math.isfinite(value)}
            if bad:
                self._stop(bad, values, due)

    def _stop(self, bad: dict[str, float], values: dict[str, float], due: _Pending) -> None:
        rank = world().rank  # every process has a part of the batch
        path = self._folder / (f"nan_batch_rank{rank}.pth" if rank else "nan_batch.pth")
        names = ("label", "index", *(("raw", "desensitized") if self._with_images else ()))
        content: dict[str, Any] = {name: getattr(due.batch, name).cpu() for name in names}
        content |= {"step": due.step, "losses": values}
        try:
            save_tensors(content, path)
            kept = f"its batch is saved in {path}"
        except WriteError as error:
            kept = f"its batch could not be saved ({error})"
        listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteError(
            f"the loss is no longer finite at step {due.step} ({listed}); {kept}; the last "
            "checkpoint is unchanged"
        )
