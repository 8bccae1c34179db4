"""Normal noise as a function of one key per image: the same on every device, in any order.

A generator hands out numbers in the order it is asked, so a score, or one rank's share of a batch,
would depend on who asked before. Here every number is a hash of (key, place), which any device can
compute for all pixels at once.

Conventional desensitizers: mosaic, blur and noise on batches of 8-bit images, on any device.

To add one, write a class with :class:`Desensitizer`'s interface and name it in ``DESENSITIZERS``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from utils.errors import UserError
from utils.seeding import derive_seed

# SplitMix64 (Steele, Lea, Flood 2014): increment and multipliers, as two's-complement int64.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_TABLE_BITS = 16
_GPU_CHUNK = 32  # images that are hashed at once


def draw_keys(count: int, generator: torch.Generator) -> Tensor:
    """Draw one noise key per image, int64 (count,)."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def content_keys(images: Tensor, seed: int) -> Tensor:
    """Key of each image: a 64-bit hash of its pixels and the seed.

    A multilinear hash with one pseudo-random weight per byte, so that equal images have equal keys
    whatever batch they come in, and images that differ anywhere have different ones (up to chance).

    Args:
        images: uint8 (B, 3, H, W).
        seed: Any integer.

    Returns:
        int64 (B,) on the device of the images.
    """
    flat = images.flatten(1)
    secret = derive_seed(seed, "content")
    weights = _mix(_places(flat.shape[1], images.device) + secret)
    # A whole batch as int64 would need eight times its memory; a GPU wants more than one image.
    chunk = 1 if images.device.type == "cpu" else _GPU_CHUNK
    keys = torch.cat([(part * weights).sum(1) for part in flat.split(chunk)])
    return _mix(keys + secret)


def normal_noise(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers, a pure function of the key and the place.

    Every 64-bit hash gives four 16-bit numbers, which index 2**16 quantiles of the normal
    distribution: steps of 4e-5 standard deviations around the centre, tails end at 4.3.

    Args:
        keys: int64 (B,).
        count: Numbers per key.

    Returns:
        float32 (B, count) on the device of the keys, bit for bit the same on every device.
    """
    words = -(-count // 4)
    bits = _mix(keys[:, None] + _places(words, keys.device))
    index = bits.view(torch.int16).to(torch.int32).bitwise_and_((1 << _TABLE_BITS) - 1)
    noise = _quantiles(keys.device).index_select(0, index.view(-1))
    return noise.view(len(keys), 4 * words)[:, :count]


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; right shifts are made logical by masking."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        shifted = words.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)
        words = shifted.bitwise_xor_(words).mul_(multiplier)
    shifted = words.bitwise_right_shift(31).bitwise_and_((1 << 33) - 1)
    return shifted.bitwise_xor_(words)


@lru_cache(maxsize=8)
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device) * _INCREMENT


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    """Quantiles of the standard normal distribution at the centres of 2**16 equal shares."""
    size = 1 << _TABLE_BITS
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.special.ndtri(centres).float().to(device)


_BOX_PASSES = 3  # Pillow approximates a Gaussian by three extended box filters
_FIXED_POINT_BITS = 24
_NOISE_CHUNK = 4  # images whose intermediate values stay in a CPU's second-level cache


class Desensitizer(ABC):
    """Takes people out of resized 8-bit images, before augmentation.

    Args:
        radius: Strength; its unit and range depend on the method.
        seed: What test-time randomness is derived from.

    Attributes:
        radius: As given.
        cacheable: Whether the result depends on the image alone and costs enough to be kept.
        keyed: Whether training draws a new key per image and epoch.
    """

    cacheable: ClassVar[bool] = False
    keyed: ClassVar[bool] = False

    def __init__(self, radius: float, seed: int = 1) -> None:
        self.radius = float(radius)
        self.seed = seed
        problem = self._problem()
        if problem:
            raise UserError(f"INPUT.RADIUS is {radius} for {type(self).__name__}; {problem}")

    @abstractmethod
    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Desensitize images.

        Args:
            images: uint8 (B, 3, H, W); left unchanged.
            keys: int64 (B,), what the randomness of each image is derived from; none: a function of
                (seed, image), so that a score can be repeated.

        Returns:
            uint8 (B, 3, H, W) on the same device.
        """

    def _problem(self) -> str:
        return "" if self.radius > 0 else "expected a number above 0"


class Mosaic(Desensitizer):
    """Tiles of RADIUS pixels from the top-left corner, each filled with its top-left pixel."""

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See :meth:`Desensitizer.__call__`."""
        tile = int(self.radius)
        height, width = images.shape[2:]
        # Repeated along the rows while they are few, then whole rows: copies, no look-ups.
        rows = _repeated(images[:, :, ::tile, ::tile], 3, tile)[..., :width]
        return _repeated(rows, 2, tile)[:, :, :height].contiguous()

    def _problem(self) -> str:
        whole = self.radius.is_integer() and self.radius >= 2
        return "" if whole else "expected a whole number of pixels, 2 or more"


def _repeated(images: Tensor, axis: int, count: int) -> Tensor:
    """Repeat each element of an axis; torch's repeat_interleave, without its look-ups."""
    shape = [*images.shape[: axis + 1], count, *images.shape[axis + 1 :]]
    return images.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)


class Blur(Desensitizer):
    """Pillow's GaussianBlur of RADIUS pixels, bit for bit.

    On a CPU Pillow itself does it, four times as fast as tensors would; elsewhere the same integer
    arithmetic runs on whole batches (:func:`gaussian_blur`).
    """

    cacheable = True

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See :meth:`Desensitizer.__call__`."""
        if images.device.type != "cpu":
            return gaussian_blur(images, self.radius)
        blurred = torch.empty_like(images)
        pairs = zip(images.numpy(), blurred.numpy(), strict=True)
        threads = min(torch.get_num_threads(), len(images))
        if threads <= 1:
            for pair in pairs:
                self._blur_with_pillow(pair)
        else:  # Pillow lets other threads run while it filters
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(self._blur_with_pillow, pairs))
        return blurred

    def _blur_with_pillow(self, pair: tuple[np.ndarray, np.ndarray]) -> None:
        source, target = pair
        picture = Image.fromarray(np.ascontiguousarray(source.transpose(1, 2, 0)))
        picture = picture.filter(ImageFilter.GaussianBlur(self.radius))
        target[:] = np.asarray(picture).transpose(2, 0, 1)


class Noise(Desensitizer):
    """Gaussian noise of standard deviation RADIUS on values in [0, 1], clipped, in 8-bit steps."""

    keyed = True

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """See :meth:`Desensitizer.__call__`."""
        keys = (
            content_keys(images, self.seed)
            if keys is None
            else keys.to(images.device, non_blocking=True)
        )
        noisy = torch.empty_like(images, memory_format=torch.contiguous_format)
        step = _NOISE_CHUNK if images.device.type == "cpu" else max(1, len(images))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            values = normal_noise(keys[part], images.shape[1:].numel()).view(images[part].shape)
            values = values.mul_(255.0 * self.radius).add_(images[part])
            noisy[part] = values.round_().clamp_(0, 255)
        return noisy


DESENSITIZERS: dict[str, type[Desensitizer]] = {"blur": Blur, "mosaic": Mosaic, "noise": Noise}


def make_desensitizer(name: str, radius: float, seed: int = 1) -> Desensitizer:
    """Return the desensitizer of a name.

    Raises:
        UserError: If the name or the radius is none that is known.
    """
    if name not in DESENSITIZERS:
        choices = ", ".join(sorted(DESENSITIZERS))
        raise UserError(f"INPUT.TYPE is '{name}'; expected one of {choices}")
    return DESENSITIZERS[name](radius, seed)


def gaussian_blur(images: Tensor, radius: float) -> Tensor:
    """Pillow's GaussianBlur on tensors, bit for bit, on any device.

    Three box filters of fractional width along each row and then along each column (Gwosdek et al.,
    "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", 2011), with weights
    of 24 fractional bits, edges repeated, and rounding to 8 bits after every pass.

    Args:
        images: uint8 (..., H, W).
        radius: Standard deviation, px.

    Returns:
        uint8 (..., H, W).
    """
    whole, inner, outer = _box_weights(radius)
    values = images
    for axis in (-1,) * _BOX_PASSES + (-2,) * _BOX_PASSES:
        values = _box_pass(values, axis, whole, inner, outer)
    return values


def _box_pass(images: Tensor, axis: int, whole: int, inner: int, outer: int) -> Tensor:
    """One box filter: 2 whole + 1 pixels of weight inner between two of weight outer."""
    size = images.shape[axis]
    places = torch.arange(-whole - 1, size + whole + 1, device=images.device).clamp_(0, size - 1)
    padded = images.index_select(axis, places)
    sums = padded.cumsum(axis, dtype=torch.int32)
    box = sums.narrow(axis, 2 * whole + 1, size) - sums.narrow(axis, 0, size)
    ends = padded.narrow(axis, 0, size).int() + padded.narrow(axis, 2 * whole + 2, size)
    total = box.long().mul_(inner).add_(ends, alpha=outer)
    return total.add_(1 << (_FIXED_POINT_BITS - 1)).bitwise_right_shift_(_FIXED_POINT_BITS).byte()


def _box_weights(radius: float) -> tuple[int, int, int]:
    """Whole radius of the box, weights of its pixels and of the two beyond, 24-bit fixed point.

    Computed in single precision like Pillow's, since the weights must agree to the last bit.
    """
    single = np.float32
    one, two, three, six = (single(number) for number in (1, 2, 3, 6))
    variance = single(radius) * single(radius) / single(_BOX_PASSES)
    length = single(math.sqrt(12.0 * float(variance) + 1.0))
    whole = single(math.floor((float(length) - 1.0) / 2.0))
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    part = part / (six * (variance - (whole + one) * (whole + one)))
    box_radius = whole + part
    inner = int(single(1 << _FIXED_POINT_BITS) / (box_radius * two + one))
    outer = ((1 << _FIXED_POINT_BITS) - (2 * int(box_radius) + 1) * inner) // 2
    return int(box_radius), inner, outer
