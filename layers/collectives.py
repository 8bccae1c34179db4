"""Batch statistics and gathered features over the processes of a run, with gradients.

Every process has an equal share of the batch, and gradients of parameters are averaged over the
processes after each has computed those of its own loss. So what is minimised is (1/N) sum_s L_s,
and the backward pass of a collective sums the gradients of all processes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from utils.device import full_precision


def in_parallel() -> bool:
    """Return whether this process is one of several of a run."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def gather_batch(share: Tensor) -> Tensor:
    """Return the rows of all processes, (B, ...), by rank, from this process's rows (B/N, ...)."""
    return torch.cat(all_gather(share))


def synchronize_norms(network: nn.Module, device: torch.device) -> None:
    """Let every batch norm of a network use the statistics of all processes' images.

    Parameters stay the same objects, under the same keys. torch's SyncBatchNorm exists for CUDA
    only, so the class depends on the device of the network.
    """
    for name, child in network.named_children():
        if not isinstance(child, _BatchNorm):
            synchronize_norms(child, device)
            continue
        on_cuda = device.type == "cuda"
        convert = nn.SyncBatchNorm.convert_sync_batchnorm if on_cuda else CPUSyncBatchNorm.like
        synced = convert(child)
        # timm's BatchNormAct2d applies dropout and activation after the normalisation.
        for module in child.children():
            synced.register_forward_hook(partial(_apply_to_output, module))
        setattr(network, name, synced)


def _apply_to_output(
    module: nn.Module, _norm: nn.Module, _inputs: object, output: Tensor
) -> Tensor:
    applied: Tensor = module(output)
    return applied


class CPUSyncBatchNorm(_BatchNorm):
    """Batch norm over the shares of all processes, for gloo, which SyncBatchNorm does not support.

    In evaluation mode it is plain batch norm. Keys of the state dict are those of ``BatchNorm2d``.
    """

    @classmethod
    def like(cls, norm: _BatchNorm) -> CPUSyncBatchNorm:
        """Return a layer with the parameters and buffers of another."""
        synced = cls(norm.num_features, norm.eps, norm.momentum)
        synced.weight, synced.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(synced, name, buffer)
        return synced.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.ndim < 2:
            raise ValueError(f"got a tensor {tuple(input.shape)}; expected (B, C, ...)")

    def forward(self, features: Tensor) -> Tensor:
        """Normalise (B, C, ...) by channel; shape and type stay the same."""
        if not self.training:
            return super().forward(features)
        self._check_input_dim(features)
        with full_precision(features):
            values = features.float()
            dims = [dim for dim in range(values.ndim) if dim != 1]
            own_variance, own_mean = torch.var_mean(values, dim=dims, correction=0)
            mean = _mean_over_processes(own_mean)
            variance = _mean_over_processes(own_variance + (own_mean - mean).square())
            count = distributed.get_world_size() * values.numel() // values.shape[1]
            update_running(self, mean, variance, count)
            # One multiplication and one addition per value, as in torch's CPU kernel.
            scale = self.weight * torch.rsqrt(variance + self.eps)
            shift = self.bias - mean * scale
            shape = (1, -1, *[1] * (values.ndim - 2))
            return (values * scale.view(shape) + shift.view(shape)).to(features.dtype)


@torch.no_grad()
def update_running(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics of a layer with a fixed momentum as nn.BatchNorm2d does.

    Mean and population variance (C,) were computed from ``count`` values; the unbiased variance is
    stored.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), norm.momentum)


def _mean_over_processes(values: Tensor) -> Tensor:
    total: Tensor = all_reduce(values)
    return total / distributed.get_world_size()
