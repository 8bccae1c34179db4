"""The non-local block of the AGW re-ID network, with the keys of its checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

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

    Args:
        channels: Channels C of the feature map.
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
