"""One interface for every encryption scheme, and how an evaluation reads sealed images.

Images are float tensors (B, 3, H, W) in the anonymizer's output space: [-1, 1], normalised pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from modeling.encryption.errors import AuthenticationError
from modeling.encryption.keys import EvaluationKeys, KeySource, WrongKeys
from utils.errors import UserError

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
