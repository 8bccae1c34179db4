"""PSNR and SSIM of images against raw images, as defined in docs/SCORING.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from utils.device import exact_float32
from utils.errors import UserError

_WINDOW = 11
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2
# Values per block. On a CPU, four maps of this size fit into the cache.
_BLOCK_VALUES = {"cpu": 2**18, "cuda": 2**25}


@dataclass(frozen=True)
class ImageQuality:
    """PSNR and SSIM of a set of images."""

    # PSNR of the squared error pooled over all images (dB); infinite for equal images
    psnr_db: float
    ssim: float  # mean over images, channels and pixels


class QualityAccumulator:
    """Collects batches. The result does not depend on the batch size.

    Values stay on their device until a result is requested, so that ``update`` never waits for the
    GPU.
    """

    def __init__(self, rows: Sequence[Tensor] = ()) -> None:
        self._rows = list(rows)  # as returned by :meth:`rows`, for each batch

    @torch.no_grad()
    def update(self, raw: Tensor, image: Tensor) -> None:
        """Add B images.

        Args:
            raw: Raw images, values in [0, 1], floating point (B, C, H, W).
            image: Images to score; values outside [0, 1] are not clipped.

        Raises:
            UserError: The arguments are not floating-point batches of the same shape.
        """
        error, ssim = mean_squared_error(raw, image), structural_similarity(raw, image)
        if len(raw):
            values = torch.full_like(error, raw[0].numel(), dtype=torch.float64)
            self._rows.append(torch.stack([error.double(), ssim.double(), values], 1))

    def rows(self) -> Tensor:
        """Return squared error, SSIM and number of values of each image, float64 (N, 3)."""
        return torch.cat([torch.zeros(0, 3).double(), *(rows.cpu() for rows in self._rows)])

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self._rows))

    def result(self) -> ImageQuality:
        """Return the scores of all images.

        Raises:
            UserError: No image was added, or one contains NaN.
        """
        error, ssim, values = self._columns()
        if bool((error + ssim).isnan().any()):
            raise UserError("images to score contain NaN; check the weights of the networks")
        weights = values / values.sum()  # larger images have a larger weight
        return ImageQuality(float(_psnr_db((error * weights).sum())), float((ssim * weights).sum()))

    def per_image(self) -> tuple[Tensor, Tensor]:
        """Return PSNR (dB) and SSIM of each image, float64 (N,), in the order of ``update``.

        Raises:
            UserError: No image was added.
        """
        error, ssim, _ = self._columns()
        return _psnr_db(error), ssim

    def _columns(self) -> tuple[Tensor, ...]:
        if not len(self):
            raise UserError("no image was added; the quality of no images is undefined")
        return self.rows().unbind(1)


def mean_squared_error(raw: Tensor, image: Tensor) -> Tensor:
    """Return the mean squared error of each image, float32 (B,); arguments as for ``update``."""
    _check(raw, image)
    return (image.float() - raw.float()).square().flatten(1).mean(1)


def structural_similarity(raw: Tensor, image: Tensor) -> Tensor:
    """Return the SSIM of each image, float32 (B,).

    11 x 11 Gaussian window (sigma 1.5), zero padding, K1 .01, K2 .03, population covariance, mean
    over channels and pixels; in float32 whatever autocast is in force.

    Args:
        raw: Images with values in [0, 1], floating point (B, C, H, W).
        image: Images of the same shape.

    Source: Wang et al., "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 2004.
    """
    _check(raw, image)
    if not len(raw):
        return raw.new_zeros(0, dtype=torch.float32)
    values = _BLOCK_VALUES.get(raw.device.type, _BLOCK_VALUES["cpu"])
    images = max(1, values // max(raw[0].numel(), 1))
    with exact_float32(raw.device):
        blocks = zip(raw.split(images), image.split(images), strict=True)
        return torch.cat([_ssim(x.float(), y.float()) for x, y in blocks])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    # The two variances only ever occur as a sum, so four maps are blurred instead of five.
    blurred = _blur(torch.cat([x, y, x * x + y * y, x * y]))
    mean_x, mean_y, square, product = blurred.chunk(4)
    mean_xy = mean_x * mean_y
    mean_square = mean_x.square() + mean_y.square()
    numerator = (2 * mean_xy + _C1) * (2 * (product - mean_xy) + _C2)
    denominator = (mean_square + _C1) * (square - mean_square + _C2)
    return (numerator / denominator).flatten(1).mean(1)


def _blur(maps: Tensor) -> Tensor:
    """Apply the zero-padded Gaussian window to maps (N, C, H, W).

    Along either axis that is a product with a banded matrix. On CPUs it is seven to ten times
    faster than a depthwise convolution, which torch does not vectorise for one channel.
    """
    height, width = maps.shape[-2:]
    rows = torch.mm(maps.reshape(-1, width), _band(width, maps.device)).view(maps.shape)
    return torch.matmul(_band(height, maps.device), rows)


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)  # cached: must also serve callers that want gradients
def _band(size: int, device: torch.device) -> Tensor:
    """Return the symmetric matrix (size, size) that blurs an axis of that length."""
    place = torch.arange(size, dtype=torch.float64)
    distance = (place[:, None] - place[None, :]).abs()
    reach = _WINDOW // 2
    taps = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / 2 / _SIGMA**2)
    weight = torch.exp(-distance.square() / 2 / _SIGMA**2) / taps.sum()
    return weight.where(distance <= reach, torch.zeros_like(weight)).float().to(device)


def _psnr_db(error: Tensor) -> Tensor:
    """Return the PSNR (dB) of mean squared errors of values whose peak is 1."""
    return -10.0 * torch.log10(error)


def _check(raw: Tensor, image: Tensor) -> None:
    if raw.shape != image.shape or raw.ndim != 4:
        raise UserError(
            f"images to compare have shapes {tuple(raw.shape)} and {tuple(image.shape)}; expected "
            "two batches (images, channels, height, width) of one shape"
        )
    if not (raw.is_floating_point() and image.is_floating_point()):
        raise UserError(
            f"images to compare are {raw.dtype} and {image.dtype}; expected floating-point values "
            "in [0, 1]: see layers.pixels.PixelSpace.denormalize"
        )
