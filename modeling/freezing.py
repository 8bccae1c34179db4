"""Holding networks still while gradients flow through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Take gradients through the modules' inputs but not into their parameters.

    Saves the weights' half of their backward pass, and keeps a generator's step from leaving
    gradients behind in a discriminator. The backward pass may run after the context: what needs a
    gradient is decided in the forward pass. Parameters that were frozen before stay frozen.
    """
    parameters = [
        parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
