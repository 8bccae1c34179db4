"""How two ciphertexts under one key may be set against each other, for every scheme.

An attacker does not know in advance which algebra a scheme gives way to. He tries each on images of
his own, under keys of his own, and takes the one that works best.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.attacks.files import holds_bytes
from engine.attacks.levels import Stored
from modeling.encryption.levels import PixelLevels

# (what is seen of the target, what is seen of the known image, the known image) -> the target
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
_LEVELS = PixelLevels()


def subtract(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Take what was added to the known image off the target."""
    return target - (known - plain)


def exclusive_or(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Take a key stream that was XORed to bytes off the target."""
    one, two, three = (_bytes(images) for images in (target, known, plain))
    return _images(one ^ two ^ three)


def modular(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Take a key stream that was added to bytes modulo 256 off the target."""
    one, two, three = (_bytes(images).int() for images in (target, known, plain))
    return _images(((one - two + three) % 256).to(torch.uint8))


COMBINATIONS: dict[str, Combine] = {
    "subtraction": subtract,
    "exclusive or": exclusive_or,
    "modular subtraction": modular,
}


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the difference of two images."""
    return first - second


def modular_difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the difference of bytes modulo 256, as a number from -128 to 127."""
    apart = (_bytes(first).int() - _bytes(second).int()) % 256
    return torch.where(apart > 127, apart - 256, apart).float()


def differing_bits(first: Tensor, second: Tensor) -> Tensor:
    """Return the exclusive or of bytes as a number."""
    return (_bytes(first) ^ _bytes(second)).float()


DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": difference,
    "modular difference": modular_difference,
    "exclusive or": differing_bits,
}


def usable(names: dict[str, Callable[..., Tensor]], stored: Stored) -> list[str]:
    """Return the algebras that fit what is stored: bytes have all, other numbers the first."""
    is_bytes = stored.sealed is not None and holds_bytes(stored.sealed)
    return list(names) if is_bytes else list(names)[:1]


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's r of each pair of images, float32 (N,); 0 where one is constant."""
    one, two = (x.float().flatten(1) for x in (first, second))
    one, two = one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True)
    size = one.norm(dim=1) * two.norm(dim=1)
    return torch.where(size > 0, (one * two).sum(1) / size.clamp_min(1e-30), 0.0)


def _bytes(images: Tensor) -> Tensor:
    """Return bytes in the layout of images (N, 3, H, W)."""
    return _LEVELS.to_pixels(images).permute(0, 3, 1, 2)


def _images(pixels: Tensor) -> Tensor:
    return _LEVELS.to_images(pixels.permute(0, 2, 3, 1))
