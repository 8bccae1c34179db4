"""Parts of networks: the non-local block of AGW, global pooling, and recomputed activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from layers.collectives import update_running
from utils.device import full_precision


class NonLocalBlock(nn.Module):
    """x + BN(W(y)), y_i = (1/HW) sum_j theta(x_i) phi(x_j) g(x_j), with one inner channel.

    With one inner channel the HW x HW affinity theta(x_i) phi(x_j) has rank one. The product is
    therefore computed as y_i = theta(x_i) * mean_j phi(x_j) g(x_j), linear in HW in time and
    memory. W maps a single channel: its output in channel c is w_c y + b_c, whose batch statistics
    follow from those of y (mean w_c m + b_c, variance w_c^2 v). Batch norm of it is one affine map
    a_c y + s_c, so that no (B, C, H, W) tensor except the sum is stored for the backward pass. The
    numbers are those of the plain form.

    Source: X. Wang, R. Girshick, A. Gupta, K. He, "Non-local Neural Networks", CVPR 2018; the
    one-channel variant without softmax is AGW's (M. Ye et al., TPAMI 2021).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Conv2d(channels, 1, 1)
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))
        self.theta = nn.Conv2d(channels, 1, 1)
        self.phi = nn.Conv2d(channels, 1, 1)
        # The block starts as the identity.
        norm = self.W[1]
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape, type and memory format."""
        response = self._response(features)
        norm = self.W[1]
        if type(norm) is not nn.BatchNorm2d:  # synchronised over processes: the plain form
            return features + self.W(response.to(features.dtype))
        with full_precision(features):
            scale, shift = self._affine(response)
        dtype = features.dtype
        # (C, 1, 1) against (B, 1, H, W); the shift goes in place, addcmul keeps no output.
        out = torch.addcmul(features, scale.to(dtype).view(-1, 1, 1), response.to(dtype))
        return out.add_(shift.to(dtype).view(-1, 1, 1))

    def _response(self, features: Tensor) -> Tensor:
        """Return y (B, 1, H, W), float32."""
        # One convolution with three output channels reads the feature map once, not three times.
        weight = torch.cat((self.theta.weight, self.phi.weight, self.g.weight))
        bias = torch.cat([_bias(conv) for conv in (self.theta, self.phi, self.g)])
        theta, phi, g = functional.conv2d(features, weight, bias).float().split(1, dim=1)
        return theta * (phi * g).mean(dim=(2, 3), keepdim=True)

    def _affine(self, response: Tensor) -> tuple[Tensor, Tensor]:
        """Return a (C,) and s (C,) with BN(W(y)) = a y + s, and update the running statistics."""
        conv, norm = self.W[0], self.W[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        weight, bias = conv.weight.flatten(), _bias(conv)
        if norm.training:
            variance, mean = torch.var_mean(response, correction=0)
            channel_mean, channel_var = weight * mean + bias, weight.square() * variance
            update_running(norm, channel_mean, channel_var, response.numel())
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            channel_mean, channel_var = norm.running_mean, norm.running_var
        gain = norm.weight * torch.rsqrt(channel_var + norm.eps)
        return gain * weight, norm.bias + gain * (bias - channel_mean)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


class GeneralizedMeanPooling(nn.Module):
    """Generalised mean over all positions, (mean x^p)^(1/p), with a learnt exponent p.

    p = 1 is average pooling, p -> infinity is max pooling. Values below ``floor``, such as negative
    ones, are replaced by it, because a power of a negative number has no real value. p starts at
    ``exponent``.

    Source: F. Radenovic, G. Tolias, O. Chum, "Fine-tuning CNN image retrieval with no human
    annotation", TPAMI 2019.
    """

    def __init__(self, exponent: float = 3.0, floor: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), exponent))
        self.floor = floor

    def forward(self, features: Tensor) -> Tensor:
        """Pool (B, C, H, W) into float32 (B, C)."""
        with full_precision(features):
            # Traced without the function below, a module can be saved.
            if not torch.is_grad_enabled() or torch.jit.is_tracing():
                return _power_mean(features, self.p, self.floor)[1]
            return cast("Tensor", _PowerMean.apply(features, self.p, self.floor))


class _PowerMean(torch.autograd.Function):
    """The generalised mean with its gradients in closed form.

    The gradients of ``clamp`` followed by ``pow`` store two float32 copies of the map and read it
    nearly twice as often: 0.1 s of a step of 16 images on one CPU thread.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, p: Tensor, floor: float) -> Tensor:
        mean, pooled = _power_mean(features, p, floor)
        ctx.save_for_backward(features, p, mean, pooled)
        ctx.floor = floor
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # With M = (mean x^p)^(1/p) over n positions: dM/dx = M / (n mean x^p) x^(p - 1), and
        # dM/dp = sum (dM/dx) x log(x) / p - M log(mean x^p) / p^2.
        features, p, mean, pooled = ctx.saved_tensors
        values = _clamped(features, ctx.floor)
        scale = gradient * pooled / (mean * (features.shape[2] * features.shape[3]))
        slope = values.pow(p - 1.0).mul_(scale[:, :, None, None])
        by_values = values.log().mul_(values).mul_(slope).sum() / p
        by_root = (gradient * pooled * mean.log()).sum() / p.square()
        # The gradient is zero where the floor replaced a value; as for a ReLU, in one pass.
        slope = torch.ops.aten.threshold_backward(slope.to(features.dtype), features, ctx.floor)
        return slope, by_values - by_root, None


def _clamped(features: Tensor, floor: float) -> Tensor:
    return features.float().clamp(min=floor)


def _power_mean(features: Tensor, p: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return mean x^p and its root, both (B, C)."""
    powers = _clamped(features, floor).pow(p)
    mean = powers.sum(dim=(2, 3)) / (features.shape[2] * features.shape[3])
    return mean, mean.pow(1.0 / p)


class AveragePooling(nn.Module):
    """Mean over all positions."""

    def forward(self, features: Tensor) -> Tensor:
        """Pool (B, C, H, W) into float32 (B, C)."""
        with full_precision(features):
            return features.float().mean(dim=(2, 3))


class Backbone(nn.Module):
    """Base of every feature extractor of the re-ID network."""

    out_channels: int  # channels C of the feature map
    # Whether about half of the features are negative. Generalised-mean pooling would replace them
    # by 0.
    signed: bool = False

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to features (B, C, H', W')."""
        raise NotImplementedError


class Recomputable:
    """Base class of networks that can keep only the inputs of their parts for the backward pass."""

    # Whether they do when gradients are computed. Outputs, gradients and running statistics are the
    # same either way.
    recompute: bool = False

    def run_part(self, part: nn.Module, features: Tensor) -> Tensor:
        """Return ``part(features)``; its inner activations are not kept if ``recompute`` is True.

        The part must not change its input in place, since the recomputation starts from it.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            return cast("Tensor", part(features))
        # The parts draw no random numbers, so the generator's state need not be saved.
        out = checkpoint(
            part,
            features,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _without_statistics(part)),
        )
        return cast("Tensor", out)


def set_recompute(network: nn.Module, recompute: bool) -> None:
    """Set for all networks inside ``network`` whether they recompute their activations."""
    for module in network.modules():
        if isinstance(module, Recomputable):
            module.recompute = recompute


@contextmanager
def _without_statistics(part: nn.Module) -> Iterator[None]:
    """Make batch norms update copies of their running statistics, which contain the batch already.

    Switching the statistics off is not possible: the recomputation would save fewer tensors than
    the forward pass, which torch reports as an error.
    """
    buffers = [
        (norm, name, buffer)
        for norm in part.modules()
        if isinstance(norm, _BatchNorm) and norm.training
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)
