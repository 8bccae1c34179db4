"""Normal noise as a function of one key per image: the same on every device, in any order.

A generator hands out numbers in the order it is asked, so a score, or one rank's share of a batch,
would depend on who asked before. Here every number is a hash of (key, place), which any device can
compute for all pixels at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

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
