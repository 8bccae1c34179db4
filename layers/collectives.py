"""Gathering a tensor from all processes of a run, with gradients.

Both functions put the processes' tensors side by side in the order of their ranks; they differ in
what the other processes do with the result, and so in the backward pass. Throughout, every process
has an equal share of the batch, and gradients of parameters are averaged over the processes (as
``DistributedDataParallel`` does) after each has taken those of its own loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def in_parallel() -> bool:
    """Tell whether this process is one of several of a run."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def gather_for_one_loss(share: Tensor) -> Tensor:
    """Gather rows for a loss of the whole batch that every process computes alike.

    Let L be that loss and f_r the rows of process r of N. Averaging gives the parameters
    (1/N) sum_r g_r df_r/dp, and the gradient of L is sum_r dL/df_r df_r/dp: so process r has to
    hand down g_r = N dL/df_r. As all compute the same L from the same rows, each has dL/df_r at
    hand, and the backward pass needs no communication.

    Args:
        share: Rows of this process (B/N, ...), as many as every other one has.

    Returns:
        (B, ...), the same on all processes.
    """
    gathered: Tensor = _GatherForOneLoss.apply(share)
    return gathered


def gather_for_own_losses(share: Tensor) -> Tensor:
    """Gather rows that every process uses for a loss of its own, such as batch statistics.

    What is minimised is (1/N) sum_s L_s. The averaging supplies 1/N, so process r has to hand down
    sum_s dL_s/df_r: the backward pass adds up what all processes have for its rows.

    Args:
        share: Rows of this process (K, ...), as many as every other one has.

    Returns:
        (N K, ...), the same on all processes.
    """
    gathered: Tensor = _GatherForOwnLosses.apply(share)
    return gathered


class _GatherForOneLoss(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, share: Tensor) -> Tensor:
        return gathered(share)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _own(gradient) * distributed.get_world_size()


class _GatherForOwnLosses(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, share: Tensor) -> Tensor:
        return gathered(share)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
        return _own(summed)


def gathered(share: Tensor) -> Tensor:
    """Gather rows (K, ...) of all processes, as many of each; without gradients."""
    share = share.contiguous()
    parts = [torch.empty_like(share) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, share)
    return torch.cat(parts)


def _own(gradient: Tensor) -> Tensor:
    """Return the part of a whole batch's gradient that belongs to this process."""
    return gradient.chunk(distributed.get_world_size())[distributed.get_rank()]
