"""What a file computes: a verb of ``engine.api`` from 8-bit pixels on, normalisation included."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from engine.api import Anonymizer
from layers.pixels import PixelSpace
from modeling.reid_network import ReIDNetwork

# The verbs, and the letter that checkpoints give to the network of each.
VERBS = {"anonymize": "G", "recover": "G_R", "embed": "C"}
INPUT = "pixels"


class ImageGraph(nn.Module):
    """Pictures in, pictures out: the anonymizer or the recovery network.

    Args:
        network: Maps normalised images to normalised images.
        space: Pixel space of both.
        size: Height and width of both in pixels.

    Attributes:
        output: Name of what comes out.
        shape: Its shape; N is any number of pictures.
    """

    output = "images"

    def __init__(self, network: nn.Module, space: PixelSpace, size: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.space = network, space
        self.shape: tuple[str | int, ...] = ("N", *size, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 (N, H, W, 3) to the same."""
        images = self.network(self.space.normalize(pixels.permute(0, 3, 1, 2)))
        return self.space.to_uint8(images).permute(0, 2, 3, 1)


class EmbeddingGraph(nn.Module):
    """Pictures in, unit embeddings out.

    The classifier stays outside: nobody needs it, and it tells how many people there were to train
    on.

    Args:
        network: The re-ID network.
        space: Pixel space of its images.

    Attributes:
        output: Name of what comes out.
        shape: Its shape; N is any number of pictures.
    """

    output = "embeddings"

    def __init__(self, network: ReIDNetwork, space: PixelSpace) -> None:
        super().__init__()
        self.network, self.space = network, space
        self.shape: tuple[str | int, ...] = ("N", network.feature_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 (N, H, W, 3) to float32 (N, D), each of length 1."""
        return F.normalize(self.network.embed(self.space.normalize(pixels.permute(0, 3, 1, 2))))


Graph = ImageGraph | EmbeddingGraph


def graph_of(verb: str, model: Anonymizer) -> Graph:
    """Return what the file of a verb computes, with the model's own network in it."""
    network = model.networks[verb]
    if isinstance(network, ReIDNetwork):
        return EmbeddingGraph(network, model.pixels).eval()
    return ImageGraph(network, model.pixels, model.size).eval()
