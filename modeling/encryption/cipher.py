"""The interface of every encryption scheme, and the conversion of images to bytes.

Images are float tensors (B, 3, H, W) in the anonymizer's output space, [-1, 1].
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from modeling.encryption.ised_errors import AuthenticationError
from modeling.encryption.primitives import EvaluationKeys, KeyOf
from utils.errors import UserError

KeyState = Literal["right", "wrong", "ciphertext"]


@dataclass(frozen=True)
class Sealed:
    """A batch of B encrypted images: everything that is visible without a key."""

    # The ciphertext. float32 (B, 3, H, W) if the scheme encrypts values (additive); uint8 (B, H, W,
    # 3) if it encrypts bytes (aead).
    payload: Tensor
    headers: tuple[bytes, ...]  # public bytes of each image, which identify its key
    device: torch.device  # device of the opened images

    def __len__(self) -> int:
        return len(self.headers)

    def at(self, index: int) -> Sealed:
        """Return one image as a batch of one."""
        part = slice(index, index + 1)
        return Sealed(self.payload[part], self.headers[part], self.device)


class Cipher(Protocol):
    """An encryption scheme: ``open(seal(x, subjects), keys.opening_key) == quantize(x)``.

    For a scheme that encrypts values instead of bytes, this holds within 1e-6.
    """

    name: ClassVar[str]  # in CIPHERS and in the configuration
    secure: ClassVar[bool]  # the scheme withstands the attacks of docs/ISED.md
    caution: ClassVar[str]  # warning to print next to scores of encrypted images; '' for none

    @property
    def keys(self) -> EvaluationKeys:
        """The keys that images are sealed under."""
        ...

    def quantize(self, images: Tensor) -> Tensor:
        """Return what opening returns: float32 (B, 3, H, W) on the device of the images."""
        ...

    def seal(self, images: Tensor, subjects: Sequence[str]) -> Sealed:
        """Encrypt images (B, 3, H, W), each under the key of its subject label."""
        ...

    def open(self, sealed: Sealed, key_of: KeyOf) -> Tensor:
        """Return the images decrypted with the keys of their headers, float32 (B, 3, H, W).

        Raises:
            AuthenticationError: The key is wrong or the image was changed. A secure scheme raises
                this instead of returning garbage.
            IsedError: No key matches the header, or the header is invalid.
        """
        ...

    def observe(self, sealed: Sealed) -> Tensor:
        """Return the ciphertext as images, float32 (B, 3, H, W), as an observer sees it."""
        ...


@dataclass(frozen=True)
class Reading:
    """Encrypted images after an attempt to open them."""

    images: Tensor  # float32 (B, 3, H, W) in the anonymizer's output space
    # Number of images that the cipher refused to open. `images` contains the ciphertext of those.
    num_refused: int = 0


def read_sealed(cipher: Cipher, sealed: Sealed, key: KeyState) -> Reading:
    """Open encrypted images with the right key, with another identity's key, or not at all.

    Raises:
        AuthenticationError: The right key was refused, which is a defect.
    """
    if key == "right":
        return Reading(cipher.open(sealed, cipher.keys.opening_key))
    if key == "ciphertext":
        return Reading(cipher.observe(sealed))
    if key != "wrong":
        raise ValueError(f"key state is {key!r}; expected one of right, wrong, ciphertext")
    wrong = cipher.keys.another_key
    with contextlib.suppress(AuthenticationError):
        # An unauthenticated scheme opens the whole batch with any key.
        return Reading(cipher.open(sealed, wrong))
    opened: dict[int, Tensor] = {}
    for index in range(len(sealed)):
        with contextlib.suppress(AuthenticationError):
            opened[index] = cipher.open(sealed.at(index), wrong)
    images = cipher.observe(sealed)
    images = images.clone() if opened else images  # `observe` may return the payload itself
    for index, image in opened.items():
        images[index] = image[0]
    return Reading(images, len(sealed) - len(opened))


def check_batch(images: Tensor, subjects: Sequence[str]) -> None:
    """Raise if images (B, 3, H, W) and their subjects cannot be sealed.

    Raises:
        ValueError: Wrong shape, or wrong number of subjects.
        UserError: NaN or infinity, for instance from a diverged network.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W)")
    if len(subjects) != len(images):
        raise ValueError(f"{len(subjects)} subjects for {len(images)} images; expected one each")
    # aminmax propagates NaN and is much faster than isfinite; a CPU-GPU sync point.
    if images.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(images)):
        raise UserError(
            "the images to encrypt contain NaN or infinity, so nothing was encrypted; the network "
            "that made them has diverged: use another checkpoint"
        )


def quantize_pixels(images: Tensor) -> Tensor:
    """Round images to bytes q = round((x + 1) * 127.5), half to even.

    Images are (B, 3, H, W) in [-1, 1]; values outside are clipped. The result is uint8 (B, H, W, 3)
    on the same device. On a CPU one image at a time, which stays in the cache: five times as fast.
    """
    images = images.float()
    if images.device.type != "cpu":
        return _rounded(images).permute(0, 2, 3, 1).contiguous()
    pixels = torch.empty((len(images), *images.shape[2:], 3), dtype=torch.uint8)
    for image, target in zip(images, pixels, strict=True):
        torch.stack(_rounded(image).unbind(0), dim=-1, out=target)
    return pixels


def dequantize_pixels(pixels: Tensor) -> Tensor:
    """Return float32 images (B, 3, H, W) of bytes (B, H, W, 3): q / 127.5 - 1.

    The result is the same on every device. A GPU divides by multiplying with the reciprocal, which
    would change the last bit, so there the values come from a table made in float64.
    """
    planes = pixels.permute(0, 3, 1, 2)
    if pixels.device.type == "cpu":
        images = torch.empty(planes.shape, dtype=torch.float32)
        for plane, image in zip(planes, images, strict=True):
            image.copy_(plane).mul_(2).sub_(255).div_(255)
        return images
    table = (2 * torch.arange(256, dtype=torch.float64, device=pixels.device) - 255) / 255
    return table.float().index_select(0, planes.reshape(-1).int()).view(planes.shape)


def _rounded(images: Tensor) -> Tensor:
    return (images + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
