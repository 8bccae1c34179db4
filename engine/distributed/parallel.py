"""One training step over several processes: the gradients are those of one with the whole batch.

Each process has 1/N of the batch, whole identities. ``DistributedDataParallel`` (DDP) averages the
gradients of a module's parameters while the backward pass still runs. It expects of that module one
forward and one backward, whereas one iteration here runs five networks several times in two
phases. So what DDP wraps is not a network but a phase:

- the generators' forward (anonymizer, recovery, re-ID network on each kind of image), whose losses
  are made of its output, the discriminators frozen;
- the discriminators' losses, on detached images, with both discriminators as its parameters.

Each is called once before its backward, and every one of its parameters takes part: nothing has to
be searched for unused ones, and the networks, their state dicts and the order of the step stay
those of a single process.

Why the averages are right, for the loss L of the whole batch of B images:

- Means over images or pixels (cross-entropy, L1, GAN): equal shares make L = (1/N) sum_r L_r, which
  the average of the gradients of L_r is the gradient of.
- Triplet and centre losses compare across the batch, so features and labels are gathered first, and
  every process computes the same L; ``gather_for_one_loss`` hands N times the gradient to its own
  rows, which the averaging turns into the gradient of L (derived there).
- Centres are no DDP parameters: each process has their whole gradient, of gathered features, and
  the same one. Dividing it by the weight of the loss (solver.optimizers) is as in one process.
- Batch norm: statistics of the whole batch; ``gather_for_own_losses`` derives its backward pass.
  The affine parameters get their share's gradient, summed up by DDP like any other.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from data.records import Batch
from engine.distributed.processes import world
from engine.train_step import Phases, StepOutput, TrainStep
from layers.collectives import SyncedBatchNorm, gather_for_one_loss, in_parallel
from layers.non_local import NonLocalBlock
from modeling.objectives import Objectives
from modeling.privacy_networks import Networks, PrivacyNetworks
from modeling.reid_network import LossDict
from utils.logger import get_logger

_LOGGER = get_logger()


def synchronize_norms(network: nn.Module) -> None:
    """Let every batch norm take the statistics of all processes' images; keys stay the same.

    Args:
        network: Changed in place; its parameters stay the same objects.
    """
    for name, child in network.named_children():
        if isinstance(child, NonLocalBlock):
            child.synchronized = True  # it derives its statistics from two numbers: see there
        elif isinstance(child, _BatchNorm):
            setattr(network, name, _synchronized(child))
        else:
            synchronize_norms(child)


def _synchronized(norm: _BatchNorm) -> _BatchNorm:
    synced = SyncedBatchNorm(norm.num_features, norm.eps, norm.momentum)
    synced.weight, synced.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        setattr(synced, name, buffer)
    return synced.train(norm.training)


def whole_batch(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (B, D) and labels (B,) of all processes' images from those of each."""
    gathered = gather_for_one_loss(features.float())
    everyone = gather_for_one_loss(labels)
    return gathered, everyone


def over_processes(objectives: Objectives) -> Objectives:
    """Return objectives whose metric losses see the whole batch of a run of several processes."""
    return replace(objectives, whole_batch=whole_batch) if in_parallel() else objectives


class _Phase(nn.Module):
    """A computation, as a module of the networks whose gradients it gives.

    Args:
        networks: Networks whose parameters all take part.
        run: The computation.
    """

    def __init__(self, networks: Sequence[nn.Module], run: Callable[..., Any]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        # In a tuple: if it is a module, its other networks must not become parts of this one.
        self._run = (run,)

    def forward(self, *inputs: Any) -> Any:
        """Run the computation."""
        return self._run[0](*inputs)


def parallel_phases(nets: Networks, alone: Phases) -> Phases:
    """Return the phases of a step with gradients averaged over processes; as given if alone.

    Args:
        nets: The networks, on their device; their batch norms are made to synchronise.
        alone: The phases of a single process, over the same networks.
    """
    if not in_parallel():
        return alone
    synchronize_norms(nets)
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
    # Buffers are batch statistics, the same everywhere already. The option's name has changed.
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    chosen: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    # Of 1 x 1 kernels, whose numbers lie the same way in both orders; every process would say it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(phase, **chosen)


@dataclass(frozen=True)
class SharedStep:
    """A step whose numbers are those of the whole batch, the same on all processes.

    What is logged is then what one process would log, and a loss that is not finite anywhere is so
    everywhere: all stop at the same step, before anything is saved.

    Attributes:
        step: What each process does.
    """

    step: TrainStep

    @property
    def anonymizer(self) -> nn.Module | None:
        """The anonymizer that learns, or None where there is none."""
        return self.step.anonymizer

    @torch.no_grad()
    def _average(self, output: StepOutput) -> StepOutput:
        numbers = output.numbers()
        averages = torch.stack([value.float() for value in numbers.values()])
        distributed.all_reduce(averages)
        shared: LossDict = dict(zip(numbers, averages / world().size, strict=True))
        return StepOutput(
            {name: shared[name] for name in output.losses}, shared["total"], shared["accuracy"]
        )

    def __call__(self, batch: Batch) -> StepOutput:
        """Update the networks on this process's share of a batch."""
        return self._average(self.step(batch))


def shared_step(step: TrainStep) -> TrainStep:
    """Return a step that reports the whole batch's numbers; the same one in a single process."""
    return SharedStep(step) if in_parallel() else step
