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
    """Let batch norms use the batch's statistics without adding them to the running ones again."""
    norms = [
        module
        for module in part.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
