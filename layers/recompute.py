"""Trading time for memory: activations that are computed again for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Recomputable:
    """What a network inherits that can keep only the inputs of its parts for the backward pass.

    Attributes:
        recompute: Whether it does, when gradients are taken; off at first. Nothing else changes:
            outputs, gradients and running statistics stay the same.
    """

    recompute: bool = False

    def run_part(self, part: nn.Module, features: Tensor) -> Tensor:
        """Return ``part(features)``, whose inner activations are dropped if so chosen.

        The part must leave its input as it is: what is computed again starts from it.
        """
        out: Tensor
        if not (self.recompute and torch.is_grad_enabled()):
            out = part(features)
            return out

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _without_statistics(part)

        # Nothing here draws random numbers, so their state need not be kept.
        out = checkpoint(
            part, features, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
        return out


def set_recompute(network: nn.Module, recompute: bool) -> None:
    """Choose for every network below whether it keeps its activations (SOLVER.GRAD_CHECKPOINT)."""
    for module in network.modules():
        if isinstance(module, Recomputable):
            module.recompute = recompute


@contextmanager
def _without_statistics(part: nn.Module) -> Iterator[None]:
    """Let batch norms add the batch to copies of their running statistics: it is counted already.

    They cannot do without statistics here: torch would then keep fewer tensors than in the forward
    pass, and refuses.
    """
    kept = [
        (norm, name, buffer)
        for norm in part.modules()
        if isinstance(norm, _BatchNorm) and norm.training
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
