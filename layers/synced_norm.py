"""Batch norm over the whole batch of several processes.

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

from layers.collectives import gather_for_own_losses, gathered
from layers.precision import full_precision


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
