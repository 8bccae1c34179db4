"""The training loop: train an epoch, validate, upgrade, save, in the order of the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.loaders import TrainLoader
from data.records import Batch
from engine.guard import LossGuard
from engine.report import EvalReport
from engine.run_folder import Best, RunFolder, TrainPlan, TrainState
from engine.supervision import Supervision
from engine.train_step import StepOutput, TrainStep, step_that_fits
from engine.views import as_tensor, save_image
from modeling.reid_network import LossDict
from solver.optimizers import Optimizers, set_learning_rate
from utils.logger import Progress, get_logger
from utils.metric_writer import MetricWriter, SilentWriter

_LOGGER = get_logger()


@dataclass(frozen=True)
class ValidationRun:
    """How a training is validated.

    Attributes:
        evaluate: Returns the report of the validation split; takes the epoch of the weights.
        draw: Returns an image grid of a few identities, with a column for every kind of image; None
            if no images are written.
    """

    evaluate: Callable[[int], EvalReport]
    draw: Callable[[], Image.Image] | None


@dataclass
class Trainer:
    """One training; :meth:`fit` is the loop.

    Attributes:
        step: One optimisation step, of the joint model or of the baseline.
        networks: All networks that are trained; set to training mode at the start of an epoch.
        centers: Identity centres of the centre loss.
        loader: Training batches.
        optimizers: Optimisers of the networks and of the centres.
        supervision: Returns the anonymization target, and upgrades it.
        plan: How long to train, and how often to validate, save and log.
        folder: Saves checkpoints.
        writer: TensorBoard and ``metrics.jsonl``.
        validation: Scores and draws the validation split; None without such a split.
        state: Progress of the training.
        saves_images: Whether images of the data set may be written to the output folder.
    """

    step: TrainStep
    networks: nn.Module
    centers: nn.Module
    loader: TrainLoader
    optimizers: Optimizers
    supervision: Supervision
    plan: TrainPlan
    folder: RunFolder
    writer: MetricWriter | SilentWriter
    validation: ValidationRun | None
    state: TrainState = field(default_factory=TrainState)
    saves_images: bool = True

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
        speed = num_images / seconds
        self.writer.scalars({"speed/images_per_s": speed}, epoch=epoch, step=self.state.step)
        _LOGGER.info(
            "Epoch %d done. Time per batch: %.3f[s] Speed: %.1f[samples/s]",
            epoch, seconds / len(self.loader), speed,
        )  # fmt: skip

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
        qualified = self._upgrade(report, epoch)
        upgrade = {f"upgrade/{k}": float(v) for k, v in asdict(self.supervision.state).items()}
        self.writer.scalars(report.scalars() | upgrade, epoch=epoch, step=self.state.step)
        row = report.row(*self.plan.best_by)
        if self.state.best.beaten_by(row.rank1, qualified=qualified):
            self.state.best = Best(epoch, row.rank1, qualified)
            record = asdict(self.state.best) | {"can_qualify": self._can_upgrade}
            self.folder.save_best(epoch, record)
            _LOGGER.info(
                "Best so far: epoch %d, %s rank-1 %.1f%%%s",
                epoch, row.name, 100 * row.rank1,
                " (not qualified for upgradation)" * (self._can_upgrade and not qualified),
            )  # fmt: skip
        return report

    @property
    def _can_upgrade(self) -> bool:
        return self.supervision.policy.enabled and self.step.anonymizer is not None

    def _upgrade(self, report: EvalReport, epoch: int) -> bool:
        """Upgrade supervision if possible; return whether the validation qualified."""
        if not self._can_upgrade or self.step.anonymizer is None:
            return False
        validation = report.validation
        self.supervision.update(validation, epoch, self.step.anonymizer)
        return self.supervision.policy.qualifies(validation)

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

        Args:
            epoch: Last finished epoch.
            saved: The ``training`` part of the native checkpoint.
        """
        if epoch:  # learning rates are not part of the loaded state
            set_learning_rate(self.optimizers, epoch)
        self.centers.load_state_dict(saved["centers"])
        self.supervision.load_state_dict(saved["supervision"], self.step.anonymizer)
        self.state = TrainState(epoch, saved["step"], Best(**saved["best"]))
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
