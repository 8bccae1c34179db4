"""One optimisation step of the joint model or of the baseline, from a batch to its losses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

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
from modeling.privacy_networks import Networks, PrivacyNetworks, frozen
from modeling.reid_network import LossDict, PrivacyOutput, ReIDPair
from solver.optimizers import Optimizers
from utils.device import uncompiled
from utils.errors import UserError, out_of_memory, shortage

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StepOutput:
    """The numbers of one step; 0-d tensors without gradients, still on the device."""

    losses: LossDict  # unweighted losses under stable names
    total: Tensor  # weighted sum that the anonymizer, re-ID and recovery networks were trained on
    # share of the images, raw and protected, whose true class scored highest; 0 if the re-ID
    # network is not trained
    accuracy: Tensor

    def numbers(self) -> LossDict:
        """Return all numbers by name."""
        return self.losses | {"total": self.total, "accuracy": self.accuracy}


@dataclass(frozen=True)
class Phases:
    """The trainable parts of a step, wrapped in DistributedDataParallel in a distributed run."""

    # the networks without the discriminators, on raw (and desensitized) images
    forward: Callable[..., Any]
    # losses of the discriminators from raw images, target and the output of ``forward``
    judge: Callable[[Tensor, Tensor, PrivacyOutput], LossDict]


def phases_of(nets: Networks, objectives: Objectives) -> Phases:
    """Return the phases of a step in one process."""

    def judge(raw: Tensor, target: Tensor, out: PrivacyOutput) -> LossDict:
        assert isinstance(nets, PrivacyNetworks)
        return discriminator_losses(nets, raw, target, out, objectives)

    return Phases(nets, judge)


class TrainStep(Protocol):
    """The step that the training loop calls."""

    @property
    def anonymizer(self) -> nn.Module | None:
        """The anonymizer that is trained; None for the baseline."""
        ...

    def __call__(self, batch: Batch) -> StepOutput:
        """Update the networks on one batch."""
        ...


@dataclass(frozen=True)
class _Step:
    objectives: Objectives  # losses and their weights
    optimizers: Optimizers  # optimisers of all networks and of the centres
    autocast: Autocast  # context of the networks; losses are computed in float32
    phases: Phases  # the forward passes
    # That of the networks. Images in another format would be converted by every convolution, and
    # torch.compile would make a graph for each mixture.
    memory_format: torch.memory_format = torch.contiguous_format


@dataclass(frozen=True)
class JointStep(_Step):
    """Step of mode GCR: the discriminators first, then anonymizer, re-ID and recovery together."""

    nets: PrivacyNetworks = field(kw_only=True)  # all five networks, in training mode
    supervision: Supervision = field(kw_only=True)  # returns the anonymization target

    @property
    def anonymizer(self) -> nn.Module:
        """The anonymizer that is trained."""
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

        with self.autocast(), frozen(*nets.discriminators):  # gradients flow through them only
            losses = generator_losses(nets, raw, target, out, objectives)
            losses |= reid_losses(out, batch.label, objectives)
        total = weighted(losses, objectives.weights)
        total.backward()
        self.optimizers.step_main()
        self.supervision.follow(nets.anonymizer)
        return StepOutput(_detached(judged | losses), total.detach(), _accuracy(out, batch.label))


@dataclass(frozen=True)
class BaselineStep(_Step):
    """Step of mode C: the re-ID network on raw and desensitized images."""

    anonymizer: ClassVar[None] = None

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


def _detached(losses: LossDict) -> LossDict:
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def _accuracy(out: ReIDPair, label: Tensor) -> Tensor:
    passes = [output for output in (out.reid_raw, out.reid_protected) if output is not None]
    correct = [(output.logits.argmax(1) == label).float().mean() for output in passes]
    return torch.stack(correct or [torch.zeros((), device=label.device)]).mean()


class BatchTooLarge(UserError):  # noqa: N818 - not every limit is an error
    """A training step ran out of memory."""

    exit_code = 1

    def __init__(self, size: int, reason: str, fits: int | None) -> None:
        """Describe a batch of ``size`` images, by the allocator's ``reason``.

        ``fits`` is the largest number of images that was tried and fits; 0 if not even two
        identities fit, None if none was tried.
        """
        self.size, self.fits = size, fits
        result = "" if not fits else f"; {fits} images were tried and fit"
        if fits == 0:
            result = "; no batch of two or more identities fits"
        super().__init__(f"a batch of {size} images does not fit into memory ({reason}){result}")


def step_that_fits(
    step: TrainStep, batch: Batch, *, num_instances: int, clean: Callable[[], None], alone: bool
) -> StepOutput:
    """Run a step; if memory runs out, find the largest batch that fits and raise.

    The step itself is run with smaller batches, by bisection. This changes the networks of a run
    that ends anyway, not its checkpoints. Compiled networks run uncompiled meanwhile: compiling for
    each size would take minutes.

    Args:
        step: Updates the networks.
        batch: The training batch.
        num_instances: Images of each identity in a batch; batch sizes are multiples of it.
        clean: Drops the gradients of a failed step.
        alone: Whether this is the only process. In a distributed run nothing is tried: the other
            processes do not take part in these steps.

    Raises:
        BatchTooLarge: Memory ran out.
    """
    try:
        return step(batch)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = shortage(error)
    # Outside of the except block, because the traceback keeps the failed step's activations.
    fits = _largest(step, batch, num_instances, clean) if alone else None
    raise BatchTooLarge(len(batch), reason, fits)


def _largest(step: TrainStep, batch: Batch, num_instances: int, clean: Callable[[], None]) -> int:
    """Return the largest number of images that a step can take; 0 if two identities do not fit."""
    fits, fails = 1, -(-len(batch) // num_instances)  # identities; training needs at least two
    with uncompiled():
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if _fits(step, batch, middle * num_instances, clean):
                fits = middle
            else:
                fails = middle
    return fits * num_instances if fits > 1 else 0


def _fits(step: TrainStep, batch: Batch, count: int, clean: Callable[[], None]) -> bool:
    """Return whether two steps fit; the first one creates the optimisers' moments.

    They take the first images of the batch, in which images of an identity are consecutive.
    """
    part = Batch(**{field.name: getattr(batch, field.name)[:count] for field in fields(Batch)})
    clean()
    gc.collect()  # frames of the failed step, if a reference cycle still holds them
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        for _ in range(2):
            step(part)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    return True
