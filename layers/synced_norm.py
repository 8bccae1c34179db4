"""Batch norm over the whole batch of several processes.

On CUDA that is torch's own ``SyncBatchNorm``, which exists only there; :class:`SyncedBatchNorm` is
the same mathematics in a few differentiable operations, for CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from layers.collectives import gather_for_own_losses
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
