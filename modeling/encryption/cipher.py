"""What a pixel byte means: 256 float values per channel, the same on every device.

Kind 0 (RGB8): byte b is the colour b/255, normalised with the data set's mean and deviation.
Colours of the network that lie outside [0, 1] are clipped.
Kind 1 (tanh): byte b is b/127.5 - 1, the network's own output range; nothing is clipped.

One interface for every encryption scheme, and how an evaluation reads sealed images.

Images are float tensors (B, 3, H, W) in the anonymizer's output space: [-1, 1], normalised pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from modeling.encryption.ised_errors import AuthenticationError
from modeling.encryption.keys import EvaluationKeys, KeySource, WrongKeys
from modeling.encryption.sealed_image import KIND_RGB8, KIND_TANH
from utils.errors import UserError


class PixelLevels:
    """Rounds images (B, 3, H, W) to pixels (B, H, W, 3), and looks pixels up again.

    A GPU may divide by multiplying with the reciprocal, so that the last bit would depend on the
    device: there the levels come from a table. On a CPU images are taken one at a time, as one
    stays in the cache; that is five times as fast as a whole batch.
    """

    def __init__(
        self,
        kind: int = KIND_TANH,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        """Build the table.

        Args:
            kind: KIND_RGB8 or KIND_TANH.
            mean: Mean of each normalised channel; kind 1 does not depend on it.
            std: Deviation likewise.
        """
        if kind not in (KIND_RGB8, KIND_TANH):
            raise ValueError(f"pixel kind {kind}; expected 0 or 1")
        self.kind = kind
        self._mean = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(3, 1, 1)
        step = torch.arange(256, dtype=torch.float64)
        if kind == KIND_TANH:
            table = ((2 * step - 255) / 255).expand(3, 256)
        else:
            shift = torch.tensor(mean, dtype=torch.float64).view(3, 1)
            table = (step / 255 - shift) / torch.tensor(std, dtype=torch.float64).view(3, 1)
        self._table = table.float().contiguous()
        self._constants: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def to_pixels(self, images: Tensor) -> Tensor:
        """Round images half to even; uint8 on the same device."""
        images = images.float()
        if images.device.type != "cpu":
            return self._rounded(images).permute(0, 2, 3, 1).contiguous()
        pixels = torch.empty(
            (len(images), *images.shape[2:], 3), dtype=torch.uint8, device=images.device
        )
        for image, target in zip(images, pixels, strict=True):
            torch.stack(self._rounded(image).unbind(0), dim=-1, out=target)
        return pixels

    def to_images(self, pixels: Tensor) -> Tensor:
        """Return float32 images on the device of the pixels."""
        planes = pixels.permute(0, 3, 1, 2)
        images = torch.empty(planes.shape, dtype=torch.float32, device=pixels.device)
        if pixels.device.type == "cpu" and self.kind == KIND_TANH:
            for plane, image in zip(planes, images, strict=True):
                image.copy_(plane).mul_(2).sub_(255).div_(255)
            return images
        table = self._on(pixels.device)[0]
        for channel in range(3):
            found = table[channel].index_select(0, planes[:, channel].reshape(-1).int())
            images[:, channel] = found.view_as(images[:, channel])
        return images

    def _rounded(self, images: Tensor) -> Tensor:
        """Return uint8 of the shape of images (..., 3, H, W)."""
        if self.kind == KIND_TANH:
            scaled = (images + 1).mul_(127.5)
        else:
            _, mean, std = self._on(images.device)
            scaled = (images * std).add_(mean).mul_(255)
        return scaled.round_().clamp_(0, 255).to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return table, mean and deviation on a device; sent there once."""
        if device not in self._constants:
            self._constants[device] = (
                self._table.to(device), self._mean.to(device), self._std.to(device)
            )  # fmt: skip
        return self._constants[device]


KeyState = Literal["right", "wrong", "ciphertext"]


@dataclass(frozen=True)
class Sealed:
    """B sealed images: all that somebody without a key gets to see.

    Attributes:
        scheme: Name of the cipher.
        payload: What takes the images' place: float32 (B, 3, H, W) of a scheme that works on
            values, such as additive; uint8 (B, H, W, 3) of one that works on bytes, such as aead.
        headers: Public bytes of each image by which its key is found.
        device: Where opened images go.
    """

    scheme: str
    payload: Tensor
    headers: tuple[bytes, ...]
    device: torch.device

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.headers)

    def at(self, index: int) -> Sealed:
        """Return one image as a batch of one."""
        part = slice(index, index + 1)
        return Sealed(self.scheme, self.payload[part], self.headers[part], self.device)


class Cipher(Protocol):
    """An encryption scheme. Law: ``open(seal(x, subjects), keys) == quantize(x)``.

    Attributes:
        name: Name in CIPHERS and in ISED.SCHEME.
        secure: Whether it withstands the attacks of docs/ISED.md.
        exact: Whether the law holds bit for bit (otherwise within 1e-6).
        caution: What has to be said beside scores of its encrypted images; '' for nothing.
        keys: The right keys, to seal with and to open with.
    """

    name: ClassVar[str]
    secure: ClassVar[bool]
    exact: ClassVar[bool]
    caution: ClassVar[str]

    @property
    def keys(self) -> EvaluationKeys:
        """The keys that images are sealed under."""
        ...

    def quantize(self, images: Tensor) -> Tensor:
        """Return what opening gives back, float32 (B, 3, H, W) on the device of the images."""
        ...

    def seal(self, images: Tensor, subjects: Sequence[str]) -> Sealed:
        """Encrypt images (B, 3, H, W), each under the key of its subject label."""
        ...

    def open(self, sealed: Sealed, keys: KeySource) -> Tensor:
        """Return float32 images (B, 3, H, W).

        Raises:
            AuthenticationError: The key is wrong, or the image was changed; a secure scheme raises
                it rather than return garbage.
            IsedError: There is no key for a header, or it is none.
        """
        ...

    def observe(self, sealed: Sealed) -> Tensor:
        """Return what an observer without a key would feed to a network, float32 (B, 3, H, W)."""
        ...


@dataclass(frozen=True)
class Reading:
    """Sealed images as somebody gets to see them.

    Attributes:
        images: float32 (B, 3, H, W) in the anonymizer's output space.
        num_refused: How many the cipher refused to open; those are shown as an observer sees them.
    """

    images: Tensor
    num_refused: int = 0


def read_sealed(cipher: Cipher, sealed: Sealed, key: KeyState) -> Reading:
    """Read sealed images with the right key, another identity's key, or none.

    Args:
        cipher: The scheme they were sealed by, holding the right keys.
        sealed: B images.
        key: ``right``, ``wrong`` or ``ciphertext``.

    Raises:
        AuthenticationError: The right key was refused, which means a defect.
    """
    if key == "right":
        return Reading(cipher.open(sealed, cipher.keys))
    if key == "ciphertext":
        return Reading(cipher.observe(sealed))
    if key != "wrong":
        raise ValueError(f"key state is {key!r}; expected one of right, wrong, ciphertext")
    wrong = WrongKeys(cipher.keys)
    with contextlib.suppress(AuthenticationError):
        return Reading(cipher.open(sealed, wrong))  # a scheme that knows no wrong key, at once
    opened: dict[int, Tensor] = {}
    for index in range(len(sealed)):  # each is refused for itself
        with contextlib.suppress(AuthenticationError):
            opened[index] = cipher.open(sealed.at(index), wrong)
    images = cipher.observe(sealed)
    images = images.clone() if opened else images  # it may be what is stored
    for index, image in opened.items():
        images[index] = image[0]
    return Reading(images, len(sealed) - len(opened))


def check_batch(images: Tensor, subjects: Sequence[str]) -> None:
    """Refuse what cannot be sealed.

    Raises:
        ValueError: Wrong shape or wrong number of subjects.
        UserError: Values that are not finite, as a diverged network gives them.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W)")
    if len(subjects) != len(images):
        raise ValueError(f"{len(subjects)} subjects for {len(images)} images; expected one each")
    # aminmax carries NaN through and is many times as fast as isfinite; a CPU-GPU sync point
    if images.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(images)):
        raise UserError("images hold NaN or infinity; the network's output is broken, not sealed")
