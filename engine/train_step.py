"""One optimisation step: of the joint model, or of the baseline.

Both take a batch and return its losses; the loop does not know which it runs.

A batch that does not fit into memory ends the run with the size that would.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.records import Batch
from engine.supervision import Supervision
from modeling.objectives import (
    Objectives,
    discriminator_losses,
    generator_losses,
    reid_losses,
    weighted,
)
from modeling.privacy_networks import Networks, PrivacyNetworks, ReIDOnly, frozen
from modeling.reid_network import LossDict, PrivacyOutput, ReIDPair
from solver.optimizers import Optimizers
from utils.compiling import uncompiled
from utils.errors import UserError, out_of_memory, shortage

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StepOutput:
    """What one step was like; 0-d tensors without gradients, still on the device.

    Attributes:
        losses: Unweighted losses under stable names.
        total: Weighted sum that the anonymizer, re-ID and recovery networks were trained on.
        accuracy: Share of training images, raw and protected, whose class scored highest.
    """

    losses: LossDict
    total: Tensor
    accuracy: Tensor

    def numbers(self) -> LossDict:
        """Return all of them under their names."""
        return self.losses | {"total": self.total, "accuracy": self.accuracy}


@dataclass(frozen=True)
class Phases:
    """What of a step runs networks that learn; several processes wrap it (distributed.parallel).

    Attributes:
        forward: The networks but the discriminators, on raw (and desensitized) images.
        judge: Losses of the discriminators from raw images, target and the networks' output.
    """

    forward: Callable[..., Any]
    judge: Callable[[Tensor, Tensor, PrivacyOutput], LossDict]


def phases_of(nets: Networks, objectives: Objectives) -> Phases:
    """Return the phases of a step in one process."""

    def judge(raw: Tensor, target: Tensor, out: PrivacyOutput) -> LossDict:
        assert isinstance(nets, PrivacyNetworks)
        return discriminator_losses(nets, raw, target, out, objectives)

    return Phases(nets, judge)


class TrainStep(Protocol):
    """What the loop needs of a step."""

    @property
    def anonymizer(self) -> nn.Module | None:
        """The anonymizer that learns, or None where there is none."""
        ...

    def __call__(self, batch: Batch) -> StepOutput:
        """Update the networks on one batch."""
        ...


@dataclass(frozen=True)
class JointStep:
    """Mode GCR: discriminators first, then anonymizer, re-ID and recovery together.

    Attributes:
        nets: All five networks, in training mode.
        objectives: Losses and their weights.
        optimizers: Optimisers of everything that learns.
        supervision: Gives the anonymization target.
        autocast: Context that the networks run in; losses are float32 all the same.
        phases: The forward passes.
        memory_format: That of the networks. Images in another would be brought into it by every
            convolution that they reach, and torch.compile would make a graph for each mixture.
    """

    nets: PrivacyNetworks
    objectives: Objectives
    optimizers: Optimizers
    supervision: Supervision
    autocast: Autocast
    phases: Phases
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def anonymizer(self) -> nn.Module:
        """The anonymizer that learns."""
        return self.nets.anonymizer

    def __call__(self, batch: Batch) -> StepOutput:
        """Update all five networks and the centres on one batch."""
        batch = batch.laid_out(self.memory_format)
        raw, nets, objectives = batch.raw, self.nets, self.objectives
        with self.autocast():
            target = self.supervision.target(raw, batch.desensitized)
            out = self.phases.forward(raw)
            judged = self.phases.judge(raw, target, out)
        weighted(judged).backward()
        self.optimizers.step_discriminators()

        with self.autocast(), frozen(*nets.discriminators):  # gradients flow through, not into
            losses = generator_losses(nets, raw, target, out, objectives)
            losses |= reid_losses(out, batch.label, objectives)
        total = weighted(losses, objectives.weights)
        total.backward()
        self.optimizers.step_main()
        return StepOutput(_detached(judged | losses), total.detach(), _accuracy(out, batch.label))


@dataclass(frozen=True)
class BaselineStep:
    """Mode C: the re-ID network on raw and desensitized images.

    Attributes:
        nets: The re-ID network, in training mode.
        objectives: Losses and their weights.
        optimizers: Optimisers of the network and the centres.
        autocast: Context that the network runs in; losses are float32 all the same.
        phases: The forward pass; nothing is judged.
        memory_format: That of the networks.
    """

    nets: ReIDOnly
    objectives: Objectives
    optimizers: Optimizers
    autocast: Autocast
    phases: Phases
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def anonymizer(self) -> None:
        """There is none to upgrade supervision with."""
        return None

    def __call__(self, batch: Batch) -> StepOutput:
        """Update the re-ID network and the centres on one batch."""
        batch = batch.laid_out(self.memory_format)
        with self.autocast():
            out = self.phases.forward(batch.raw, batch.desensitized)
            losses = reid_losses(out, batch.label, self.objectives)
        total = weighted(losses, self.objectives.weights)
        total.backward()
        self.optimizers.step_main()
        return StepOutput(_detached(losses), total.detach(), _accuracy(out, batch.label))


@dataclass(frozen=True)
class SearchingStep:
    """A step for whose convolutions cuDNN tries its kernels once and keeps the fastest.

    Left to itself it takes what its rules say is fast. What is kept may differ from run to run, and
    with it the rounding: so this is for training, whose batches have one size, and not for scores.

    Attributes:
        step: What is done.
    """

    step: TrainStep

    @property
    def anonymizer(self) -> nn.Module | None:
        """The anonymizer that learns, or None where there is none."""
        return self.step.anonymizer

    def __call__(self, batch: Batch) -> StepOutput:
        """Update the networks on one batch."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return self.step(batch)
        finally:
            torch.backends.cudnn.benchmark = before


def _detached(losses: LossDict) -> LossDict:
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def _accuracy(out: ReIDPair, label: Tensor) -> Tensor:
    seen = [one for one in (out.reid_raw, out.reid_protected) if one is not None]
    return torch.stack([(one.logits.argmax(1) == label).float().mean() for one in seen]).mean()


class BatchTooLarge(UserError):  # noqa: N818 - the name that says it
    """A training step ran out of memory."""

    exit_code = 1


def step_that_fits(
    step: TrainStep, batch: Batch, *, num_instances: int, clean: Callable[[], None], alone: bool
) -> StepOutput:
    """Run a step; where memory runs out, find the largest batch that fits and say so.

    Smaller batches are tried by running the step itself, halving the range each time. That trains
    networks of a run that is over anyway; what is on disk is not touched. Compiled networks run as
    they were written meanwhile: compiling for each size takes minutes, and saves memory if at all.

    Args:
        step: Updates the networks.
        batch: What to train on.
        num_instances: Images of an identity, DATALOADER.NUM_INSTANCE; batches are multiples of it.
        clean: Drops gradients that a failed step left.
        alone: Whether this is the only process; others would wait for a step that nobody else runs.

    Raises:
        BatchTooLarge: Names the size that fits.
    """
    try:
        return step(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = shortage(error)
    # Only here is the traceback gone, and with it the activations of the failed step.
    if alone:
        advice = _advice(_largest(step, batch, num_instances, clean), len(batch))
    else:
        advice = "halve SOLVER.IMS_PER_BATCH (how much fits is only tried by a single process)"
    raise BatchTooLarge(
        f"a batch of {len(batch)} images does not fit into memory ({reason}): {advice}, set "
        "SOLVER.GRAD_CHECKPOINT True, or keep images out of it (CACHE.MODE memory leaves a GPU's "
        "alone, CACHE.MODE stream all); then go on with SOLVER.RESUME True"
    )


def _largest(step: TrainStep, batch: Batch, num_instances: int, clean: Callable[[], None]) -> int:
    """Return the most images that a step takes; 0 if not even two identities fit."""
    fits, fails = 1, -(-len(batch) // num_instances)  # identities; one is too few to learn from
    with uncompiled():
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if _fits(step, _first(batch, middle * num_instances), clean):
                fits = middle
            else:
                fails = middle
    return fits * num_instances if fits > 1 else 0


def _fits(step: TrainStep, batch: Batch, clean: Callable[[], None]) -> bool:
    """Tell whether two steps fit: the first makes the optimisers' moments, beside the second."""
    clean()
    gc.collect()  # frames of the failed step, should anything still hold them in a circle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        for _ in range(2):
            step(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True


def _first(batch: Batch, count: int) -> Batch:
    """Return the first images of a batch, which holds the images of an identity side by side."""
    return Batch(**{field.name: getattr(batch, field.name)[:count] for field in fields(Batch)})


def _advice(size: int, asked: int) -> str:
    if not size:
        return "no batch of two or more identities fits: make INPUT.IMG_SIZE or MODEL.NGF smaller"
    return f"{size} images were tried and fit: set SOLVER.IMS_PER_BATCH {size} instead of {asked}"
