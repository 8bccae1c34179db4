"""Gathering a tensor from all processes of a run, with gradients.

Both functions put the processes' tensors side by side in the order of their ranks; they differ in
what the other processes do with the result, and so in the backward pass. Throughout, every process
has an equal share of the batch, and gradients of parameters are averaged over the processes (as
``DistributedDataParallel`` does) after each has taken those of its own loss.

Batch norm over the whole batch of several processes.

On CUDA it is made of the kernels of torch's ``SyncBatchNorm``, which exist only there; on CPUs of
a few differentiable operations, the same mathematics. Torch's own layer leaves out processes
without images by a mask, whose size the host has to know: it waits for the GPU three times a layer,
444 times a training step of the published size. Here every process has an equal share, and the host
waits for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.modules.batchnorm import _BatchNorm

from utils.precision import full_precision


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


class SyncedBatchNorm(_BatchNorm):
    """Batch norm whose batch is that of all processes together, each with an equal share.

    In evaluation mode it is plain batch norm. Keys of the state dict are those of ``BatchNorm2d``.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.ndim < 2:
            raise ValueError(f"got a tensor {tuple(input.shape)}; expected (B, C, ...)")

    def forward(self, features: Tensor) -> Tensor:
        """Normalise (B, C, ...) by channel; type and shape stay."""
        if not self.training:
            return super().forward(features)
        self._check_input_dim(features)
        if has_kernels(features.device):
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            normalised: Tensor = _NormByKernels.apply(
                features, self.weight, self.bias,
                self.running_mean, self.running_var, self.momentum, self.eps,
            )  # fmt: skip
            return normalised
        with full_precision(features):
            values = features.float()
            dims = [dim for dim in range(values.ndim) if dim != 1]
            variance, mean = torch.var_mean(values, dim=dims, correction=0)
            mean, variance, factor = over_processes(mean, variance)
            update_running(self, mean, variance, factor * (values.numel() // values.shape[1]))
            # As torch's CPU kernel: one multiplication and one addition per value.
            scale = self.weight * torch.rsqrt(variance + self.eps)
            shift = self.bias - mean * scale
            shape = (1, -1, *[1] * (values.ndim - 2))
            return (values * scale.view(shape) + shift.view(shape)).to(features.dtype)


def has_kernels(device: torch.device) -> bool:
    """Tell whether torch has kernels for the parts of a batch norm there."""
    return device.type == "cuda"


class _NormByKernels(torch.autograd.Function):
    """Statistics of the own share, those of all, and the values; and back alike."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        features = _laid_out(features, features)
        mean, deviation = torch.batch_norm_stats(features, eps)  # the inverse of the deviation
        means, deviations = gathered(torch.stack((mean, deviation)).unsqueeze(0)).unbind(1)
        counts = mean.new_full((len(means),), features.numel() // features.shape[1])
        mean, deviation = torch.batch_norm_gather_stats_with_counts(
            features, means, deviations, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(features, weight, mean, deviation, counts.to(torch.int32))
        return torch.batch_norm_elemt(features, weight, bias, mean, deviation, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, deviation, counts = ctx.saved_tensors
        gradient = _laid_out(gradient, features)
        whole, wanted = None, ctx.needs_input_grad
        # What the weights get is of the own share: averaging gradients adds the others'.
        sum_dy, sum_dy_xmu, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, features, mean, deviation, weight, *wanted[:3]
        )
        if wanted[0]:
            sums = torch.stack((sum_dy, sum_dy_xmu))
            distributed.all_reduce(sums)
            whole = torch.batch_norm_backward_elemt(
                gradient, features, mean, deviation, weight, sums[0], sums[1], counts
            )
        return (
            whole, of_weight if wanted[1] else None, of_bias if wanted[2] else None, *(None,) * 4
        )  # fmt: skip


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    """Return values without gaps, channels last if so are those of ``like``: kernels ask for it."""
    last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return values.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def over_processes(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean and population variance over all processes' values from those of each.

    With equal shares the mean is that of the means, and the variance that of the variances plus
    that of the means.

    Args:
        mean: Of this process's values, float32 of any shape.
        variance: Alike.

    Returns:
        Both over all processes, differentiable, and the number of processes.
    """
    # (N, 2, ...): one small collective carries both
    stacked = gather_for_own_losses(torch.stack((mean, variance)).unsqueeze(0))
    means, variances = stacked.unbind(1)
    whole = means.mean(0)
    return whole, variances.mean(0) + (means - whole).square().mean(0), len(stacked)


@torch.no_grad()
def update_running(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Move the running statistics as nn.BatchNorm2d does.

    Args:
        norm: The layer; it keeps running statistics with a fixed momentum.
        mean: Of the batch (C,).
        variance: Population variance (C,); the unbiased one is kept.
        count: Values it was taken over.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), norm.momentum)
