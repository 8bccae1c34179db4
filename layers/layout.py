"""The order in which images and networks keep their numbers in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def layout_of(network: nn.Module) -> torch.memory_format:
    """Return the memory format of a network's convolutions: channels-last or contiguous."""
    for weight in network.parameters():
        # Weights of 1 x 1 kernels, and of one input channel, are in both orders at once.
        if weight.ndim == 4 and weight.is_contiguous() != weight.is_contiguous(
            memory_format=torch.channels_last
        ):
            return torch.contiguous_format if weight.is_contiguous() else torch.channels_last
    return torch.contiguous_format


def laid_out_for(network: nn.Module, images: Tensor) -> Tensor:
    """Return images (B, C, H, W) in the memory format of a network that is given them.

    A network in another format turns them at every call. And torch.compile makes a graph of its own
    for every combination of formats that it meets: two discriminators that compare images of both
    formats would have six instead of three, of the eight it allows.
    """
    return images.contiguous(memory_format=layout_of(network))
