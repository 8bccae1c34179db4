"""A batch that does not fit into memory ends the run with the size that would."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields

import torch

from data.records import Batch
from engine.train_step import StepOutput, TrainStep
from utils.compiling import uncompiled
from utils.errors import UserError, out_of_memory, shortage


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
