"""The scheme that holds: AES-256-GCM under random keys, a fresh stream for every image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from modeling.encryption.cipher import PixelLevels, Sealed, check_batch
from modeling.encryption.ised_errors import MissingKey
from modeling.encryption.keys import EvaluationKeys, KeySource, SubjectKey
from modeling.encryption.primitives import random_key
from modeling.encryption.sealed_image import (
    LOCATOR_BYTES,
    Metadata,
    SealedPicture,
    key_id_of,
    open_picture,
    seal_picture,
)

_NO_METADATA = Metadata()


class MemoryKeys:
    """Random keys, one per subject, that live and die with this object."""

    def __init__(self) -> None:
        """Start without any key."""
        self._locator_key = random_key()
        self._by_subject: dict[str, SubjectKey] = {}
        self._by_id: dict[bytes, SubjectKey] = {}
        self._decoy = self._new_key()

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the subject's key, made on first use."""
        key = self._by_subject.get(subject)
        if key is None:
            key = self._new_key()
            self._by_subject[subject] = self._by_id[key.key_id] = key
        return key

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that the header's locator names.

        Raises:
            MissingKey: It was not made here.
        """
        key = self._by_id.get(key_id_of(header, self._locator_key))
        if key is None:
            raise MissingKey("no key in memory belongs to this image; it was sealed by another run")
        return key.key

    def another_key(self, header: bytes) -> bytes:
        """Return the key of another subject, or one that no subject has if there is no other."""
        own = key_id_of(header, self._locator_key)
        return next((key.key for name, key in self._by_id.items() if name != own), self._decoy.key)

    def _new_key(self) -> SubjectKey:
        """Return a new random key."""
        return SubjectKey(os.urandom(LOCATOR_BYTES), random_key(), self._locator_key)


class AeadCipher:
    """Rounds images to bytes and seals each like a file of docs/ISED.md, without the PNG."""

    name: ClassVar[str] = "aead"
    secure: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    caution: ClassVar[str] = ""

    def __init__(
        self, keys: EvaluationKeys | None = None, levels: PixelLevels | None = None
    ) -> None:
        """Take keys and the meaning of a pixel byte.

        Args:
            keys: Keys to seal with; random ones in memory if left out.
            levels: Meaning of a pixel byte; kind 1 if left out.
        """
        self._keys: EvaluationKeys = MemoryKeys() if keys is None else keys
        self._levels = PixelLevels() if levels is None else levels

    @property
    def keys(self) -> EvaluationKeys:
        """The keys that images are sealed under."""
        return self._keys

    def quantize(self, images: Tensor) -> Tensor:
        """Return the images at the 256 levels a byte can hold."""
        return self._levels.to_images(self._levels.to_pixels(images))

    def seal(self, images: Tensor, subjects: Sequence[str]) -> Sealed:
        """Encrypt images (B, 3, H, W), each under a fresh salt and its subject's key."""
        check_batch(images, subjects)
        pixels = self._levels.to_pixels(images).cpu().numpy()
        payload = np.empty_like(pixels)
        headers = []
        for index, subject in enumerate(subjects):
            key = self._keys.sealing_key(subject)
            sealed = seal_picture(key, pixels[index], self._levels.kind, _NO_METADATA)
            payload[index] = np.frombuffer(sealed.pixels, np.uint8).reshape(pixels.shape[1:])
            headers.append(sealed.chunk)
        return Sealed(self.name, torch.from_numpy(payload), tuple(headers), images.device)

    def open(self, sealed: Sealed, keys: KeySource) -> Tensor:
        """Decrypt; all images or none.

        Raises:
            MissingKey, WrongKey, Tampered: An image cannot be opened.
        """
        ciphertext = sealed.payload.numpy()
        height, width = ciphertext.shape[1:3]
        pixels = np.empty_like(ciphertext)
        for index, header in enumerate(sealed.headers):
            picture = SealedPicture(width, height, header, ciphertext[index].tobytes())
            pixels[index] = open_picture(keys.opening_key(header), picture).pixels
        return self._to_images(torch.from_numpy(pixels), sealed.device)

    def observe(self, sealed: Sealed) -> Tensor:
        """Return the ciphertext taken for a picture."""
        return self._to_images(sealed.payload, sealed.device)

    def _to_images(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Return float32 (B, 3, H, W) on a device for uint8 (B, H, W, 3)."""
        return self._levels.to_images(pixels.to(device))
