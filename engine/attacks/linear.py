"""Linear regression from stored to raw images, for the attacker of ``model-linear``.

It has a closed form, so it takes seconds, and neither learning rate nor length must be chosen. A
network that reconstructs worse than this was trained too little.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.attacks.measures import quality
from engine.attacks.training import TrainingSetup
from utils.device import full_precision

# Ridge penalties that are tried, as multiples of the mean variance of a principal component.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_NEGLIGIBLE = 1e-10  # variance of a component, as a share of the largest
_BLOCK = 4096  # pixels that are converted to float64 together


class LinearMap(nn.Module):
    """Maps stored images (B, 3, H, W) to raw images: ridge regression on all pixels.

    Computed on the principal components of the stored images, so that memory grows with the number
    of images N and not with the square of the pixels.

    Args:
        stored, raw: Public images, normalised (N, 3, H, W).
    """

    def __init__(self, stored: Tensor, raw: Tensor) -> None:
        super().__init__()
        center, mean = stored.mean(0), raw.mean(0)
        rows, targets = (stored - center).flatten(1), (raw - mean).flatten(1)
        blocks = (block.double() for block in rows.split(_BLOCK, dim=1))
        gram = sum((block @ block.T for block in blocks), torch.zeros((), dtype=torch.float64))
        variances, vectors = torch.linalg.eigh(gram)
        used = variances > _NEGLIGIBLE * variances.max()
        variances, vectors = variances[used], vectors[:, used]
        self.center, self.mean = nn.Buffer(center), nn.Buffer(mean)
        self.components = nn.Buffer(_product(vectors / variances.sqrt(), rows))
        self.targets = nn.Buffer(_product(vectors, targets))
        self.variances = nn.Buffer(variances)
        self.gains = nn.Buffer(torch.empty(len(variances)))
        self.set_penalty(PENALTIES[0])

    def set_penalty(self, penalty: float) -> None:
        """Set the ridge penalty, a multiple of the mean variance of a component."""
        shrunk = self.variances + penalty * self.variances.mean()
        self.gains.copy_(self.variances.sqrt() / shrunk)

    def forward(self, image: Tensor) -> Tensor:
        """Return the estimate of the raw images, in float32 also under autocast."""
        with full_precision(image):
            scores = (image.float() - self.center).flatten(1) @ self.components.T
            return ((scores * self.gains) @ self.targets).view_as(image) + self.mean


def fit_linear(
    plain: Tensor,
    raw: Tensor,
    observe: Callable[[Tensor], Tensor],
    validation: tuple[Tensor, Tensor],
    bench: TrainingSetup,
) -> tuple[LinearMap, float, float]:
    """Return the map with the best penalty on held-out identities, its penalty and PSNR (dB).

    Args:
        plain: Public images before encryption, normalised (N, 3, H, W); mirrored ones are added.
        raw: The raw images of the same samples, normalised.
        observe: Returns plain images as an outsider sees them, under new keys of the attacker.
        validation: Images of held-out public identities, observed and raw, both normalised.
        bench: Device, batch size and pixel space.
    """
    plain, raw = (torch.cat([images, images.flip(-1)]) for images in (plain, raw))
    linear = LinearMap(observe(plain), raw).to(bench.device)
    truth = bench.pixels.denormalize(validation[1])
    scores = {}
    for penalty in PENALTIES:
        linear.set_penalty(penalty)
        estimate = bench.pictures(linear, validation[0])
        scores[penalty] = float(quality(truth, estimate)[0].mean())
    best = max(scores, key=scores.__getitem__)
    linear.set_penalty(best)
    return linear.eval(), best, scores[best]


def _product(vectors: Tensor, rows: Tensor) -> Tensor:
    """Return vectors^T rows as float32, computed in float64."""
    blocks = [(vectors.T @ block.double()).float() for block in rows.split(_BLOCK, dim=1)]
    return torch.cat(blocks, dim=1)
