"""A training step over several processes, with the gradients of one process with the whole batch.

Each process has 1/N of the batch, whole identities. ``DistributedDataParallel`` (DDP) averages the
gradients of a module's parameters while the backward pass still runs. DDP expects one forward and
one backward pass of that module, but one iteration runs five networks several times in two phases.
So DDP wraps a phase, not a network:

- the forward pass of the generators (anonymizer, recovery, re-ID network on each kind of image);
  their losses are computed from its output, with frozen discriminators;
- the losses of the discriminators, on detached images; its parameters are both discriminators.

Each phase is called once before its backward pass, and all of its parameters take part, so DDP need
not search for unused ones. Networks, state dicts and the order of the step are those of a single
process.

Why the averages are right, for the loss L of the whole batch of B images:

- Means over images or pixels (cross-entropy, L1, GAN): equal shares make L = (1/N) sum_r L_r, which
  the average of the gradients of L_r is the gradient of.
- Triplet and centre losses compare images across the batch, so features and labels are gathered
  first, and every process computes the same L = (1/N) sum_r L. The backward pass of the gathering
  sums the gradients of all processes, and the averaging divides by N.
- Centres are not DDP parameters: every process has their whole gradient, from gathered features.
  Dividing it by the weight of the loss (solver.optimizers) works as in one process.
- Batch norm uses the statistics of the whole batch (layers.collectives). The gradients of its
  weight and bias are those of the share, averaged by DDP like any other.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from data.records import Batch
from engine.distributed.processes import world
from engine.train_step import Phases, StepOutput, TrainStep
from layers.collectives import gather_batch, in_parallel, synchronize_norms
from modeling.objectives import Objectives
from modeling.privacy_networks import Networks, PrivacyNetworks
from modeling.reid_network import LossDict
from utils.logger import get_logger

_LOGGER = get_logger()


def over_processes(objectives: Objectives) -> Objectives:
    """Return objectives whose metric losses see the whole batch of a run of several processes."""

    def whole_batch(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return gather_batch(features.float()), gather_batch(labels)

    return replace(objectives, whole_batch=whole_batch) if in_parallel() else objectives


class _Phase(nn.Module):
    """A computation as a module, whose parameters are those of the networks it trains."""

    def __init__(self, networks: Sequence[nn.Module], run: Callable[..., Any]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        # In a tuple, so that a module does not become a submodule of this one.
        self._run = (run,)

    def forward(self, *inputs: Any) -> Any:
        """Run the computation."""
        return self._run[0](*inputs)


def parallel_phases(nets: Networks, alone: Phases) -> Phases:
    """Return the phases of a step with gradients averaged over processes; unchanged in one process.

    The networks are on their device; their batch norms are synchronised. ``alone`` contains the
    phases of a single process, with the same networks.
    """
    if not in_parallel():
        return alone
    synchronize_norms(nets, next(nets.parameters()).device)
    _LOGGER.info(
        "%d processes share each batch: gradients are averaged by DistributedDataParallel, batch "
        "norm takes the statistics of the whole batch, triplet and centre losses its features",
        world().size,
    )
    generators = [n for n in nets.official_networks.values() if n not in nets.discriminators]
    judge = alone.judge
    if isinstance(nets, PrivacyNetworks):
        judge = _averaging(_Phase(nets.discriminators, alone.judge))
    return Phases(forward=_averaging(_Phase(generators, alone.forward)), judge=judge)


def _averaging(phase: _Phase) -> DistributedDataParallel:
    # Buffers are batch statistics, which are equal on all processes. The option's name has changed.
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    chosen: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    # 1 x 1 kernels have the same memory layout in both orders; every process would print this.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(phase, **chosen)


@dataclass(frozen=True)
class SharedStep:
    """A step whose numbers are those of the whole batch, the same on all processes.

    The log is then that of one process. A loss that is not finite on one process is not finite on
    any, so all of them stop at the same step, before anything is saved.
    """

    step: TrainStep  # the step of one process
    anonymizer: nn.Module | None  # the anonymizer that is trained; None for the baseline

    def __call__(self, batch: Batch) -> StepOutput:
        """Update the networks on this process's share of a batch."""
        output = self.step(batch)
        numbers = output.numbers()
        averages = torch.stack([value.float() for value in numbers.values()])
        distributed.all_reduce(averages)
        shared: LossDict = dict(zip(numbers, averages / world().size, strict=True))
        return StepOutput(
            {name: shared[name] for name in output.losses}, shared["total"], shared["accuracy"]
        )


def shared_step(step: TrainStep) -> TrainStep:
    """Return a step that reports the whole batch's numbers; unchanged in a single process."""
    return SharedStep(step, step.anonymizer) if in_parallel() else step
