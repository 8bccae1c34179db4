"""Recomputation of activations in the backward pass: less memory for more time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputable:
    """Base class of networks that can keep only the inputs of their parts for the backward pass.

    Attributes:
        recompute: Whether they do when gradients are computed; False by default. Outputs, gradients
            and running statistics are the same either way.
    """

    recompute: bool = False

    def run_part(self, part: nn.Module, features: Tensor) -> Tensor:
        """Return ``part(features)``; its inner activations are not kept if ``recompute`` is True.

        The part must not change its input in place, since the recomputation starts from it.
        """
        out: Tensor
        if not (self.recompute and torch.is_grad_enabled()):
            out = part(features)
            return out

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _without_statistics(part)

        # The parts draw no random numbers, so the generator's state need not be saved.
        out = checkpoint(
            part, features, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
        return out


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
