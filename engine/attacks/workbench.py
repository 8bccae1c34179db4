"""Where and how an attacker trains and runs networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.train_step import Autocast
from layers.pixels import PixelSpace
from modeling.reid_network import ReIDNetwork


@dataclass(frozen=True)
class Workbench:
    """Where and how an attacker trains.

    Attributes:
        device: Where networks are.
        autocast: Context that they run in.
        pixels: Pixel space of their images.
        batch_size: Images per update.
        steps: Updates of each network; every data budget gets the same number.
        seed: What start values and batches are drawn from.
    """

    device: torch.device
    autocast: Autocast
    pixels: PixelSpace
    batch_size: int
    steps: int
    seed: int

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return a network's output for images (N, ...), float32 on the CPU, in batches."""
        return self._in_batches(network, network, images)

    def pictures(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return an image network's output as values in [0, 1]."""
        return self.pixels.denormalize(self.run(network, images)).clamp_(0, 1)

    def embeddings(self, network: ReIDNetwork, images: Tensor) -> Tensor:
        """Return embeddings (N, D) of normalised images, float32 on the CPU."""
        return self._in_batches(network, network.embed, images)

    @torch.inference_mode()
    def _in_batches(
        self, network: nn.Module, function: Callable[[Tensor], Tensor], images: Tensor
    ) -> Tensor:
        was_training = network.training
        network.eval()
        parts = []
        for batch in images.split(self.batch_size):
            with self.autocast():
                parts.append(function(batch.to(self.device)).float().cpu())
        network.train(was_training)
        return torch.cat(parts)
