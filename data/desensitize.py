"""Conventional desensitizers: mosaic, blur and noise on batches of 8-bit images.

To add one, write a subclass of :class:`Desensitizer` and add it to ``DESENSITIZERS``.

Noise is a function of one key per image. A random generator would produce numbers in the order of
the calls, so a score, or one rank's part of a batch, would depend on the other images. Here each
number is a hash of the key and the position in the image, which any device computes in parallel.
"""

from __future__ import annotations

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
_GPU_CHUNK = 32  # images that are hashed together
_NOISE_CHUNK = 4  # images whose intermediate values fit into a CPU's second-level cache


class Desensitizer(ABC):
    """Removes the appearance of people from resized 8-bit images."""

    # Whether the result depends on the image alone and is worth keeping. Such methods run on the
    # CPU.
    cacheable: ClassVar[bool] = False
    # Whether training draws a new key for every image and epoch.
    keyed: ClassVar[bool] = False

    def __init__(self, radius: float, seed: int = 1) -> None:
        self.radius = float(radius)  # strength; unit and range depend on the method
        self.seed = seed  # of test-time noise
        problem = self._problem()
        if problem:
            raise UserError(f"the radius is {radius} for {type(self).__name__}; {problem}")

    @abstractmethod
    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return desensitized images; both are uint8 (B, 3, H, W) on the same device.

        Keys are the noise keys of the images, int64 (B,). Without keys they are a function of seed
        and image, so that scores can be repeated.
        """

    def _problem(self) -> str:
        return "" if self.radius > 0 else "expected a number above 0"


class Mosaic(Desensitizer):
    """Tiles of ``radius`` pixels, from the top-left corner, in the colour of their first pixel."""

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See :meth:`Desensitizer.__call__`."""
        tile = int(self.radius)
        height, width = images.shape[2:]
        rows = _repeated(images[:, :, ::tile, ::tile], 3, tile)[..., :width]
        return _repeated(rows, 2, tile)[:, :, :height].contiguous()

    def _problem(self) -> str:
        whole = self.radius.is_integer() and self.radius >= 2
        return "" if whole else "expected a whole number of pixels, 2 or more"


def _repeated(images: Tensor, axis: int, count: int) -> Tensor:
    """Repeat each element of an axis; faster than repeat_interleave, which gathers by index."""
    shape = [*images.shape[: axis + 1], count, *images.shape[axis + 1 :]]
    return images.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)


class Blur(Desensitizer):
    """Pillow's GaussianBlur of ``radius`` pixels, as in the published method.

    It runs on the CPU (1.2 ms an image of 256 x 128 and core) and is kept for training if memory
    allows.
    """

    cacheable = True

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """See :meth:`Desensitizer.__call__`."""
        source = images.cpu()
        blurred = torch.empty_like(source)
        pairs = zip(source.numpy(), blurred.numpy(), strict=True)
        threads = min(torch.get_num_threads(), len(source))
        if threads <= 1:
            for pair in pairs:
                self._blur_one(pair)
        else:  # Pillow releases Python's lock
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(self._blur_one, pairs))
        return blurred.to(images.device)

    def _blur_one(self, pair: tuple[np.ndarray, np.ndarray]) -> None:
        source, target = pair
        image = Image.fromarray(np.ascontiguousarray(source.transpose(1, 2, 0)))
        image = image.filter(ImageFilter.GaussianBlur(self.radius))
        target[:] = np.asarray(image).transpose(2, 0, 1)


class Noise(Desensitizer):
    """Gaussian noise of standard deviation ``radius`` on values in [0, 1], clipped to 8 bits."""

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
        UserError: The name is unknown, or the radius is out of range.
    """
    if name not in DESENSITIZERS:
        choices = ", ".join(sorted(DESENSITIZERS))
        raise UserError(f"the desensitizer is '{name}'; expected one of {choices}")
    return DESENSITIZERS[name](radius, seed)


def draw_keys(count: int, generator: torch.Generator) -> Tensor:
    """Draw one noise key per image, int64 (count,)."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def content_keys(images: Tensor, seed: int) -> Tensor:
    """Return a noise key per image: a 64-bit hash of its pixels and the seed.

    Images are uint8 (B, 3, H, W); keys are int64 (B,), on the same device.

    It is a multilinear hash with one pseudo-random weight per byte. Equal images have equal keys in
    any batch; different images have different keys with overwhelming probability.
    """
    flat = images.flatten(1)
    secret = derive_seed(seed, "content")
    weights = _mix(_counters(flat.shape[1], images.device) + secret)
    # The whole batch as int64 would take eight times its memory.
    chunk = 1 if images.device.type == "cpu" else _GPU_CHUNK
    keys = torch.cat([(part * weights).sum(1) for part in flat.split(chunk)])
    return _mix(keys + secret)


def normal_noise(keys: Tensor, count: int) -> Tensor:
    """Return standard normal numbers, float32 (B, count), as a function of key (B,) and position.

    Each 64-bit hash gives four 16-bit numbers, which index 2**16 quantiles of the normal
    distribution. Steps are 4e-5 standard deviations at the centre, and the tails end at 4.3. The
    numbers are bit-identical on every device.
    """
    words = -(-count // 4)
    bits = _mix(keys[:, None] + _counters(words, keys.device))
    index = bits.view(torch.int16).to(torch.int32).bitwise_and_((1 << _TABLE_BITS) - 1)
    noise = _quantiles(keys.device).index_select(0, index.view(-1))
    return noise.view(len(keys), 4 * words)[:, :count]


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; masks make the arithmetic right shifts logical."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        shifted = words.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)
        words = shifted.bitwise_xor_(words).mul_(multiplier)
    shifted = words.bitwise_right_shift(31).bitwise_and_((1 << 33) - 1)
    return shifted.bitwise_xor_(words)


@lru_cache(maxsize=8)
def _counters(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device) * _INCREMENT


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    """Return the quantiles of the standard normal distribution at 2**16 equally spaced ranks."""
    size = 1 << _TABLE_BITS
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.special.ndtri(centres).float().to(device)
