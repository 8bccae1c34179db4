"""The secure scheme: AES-256-GCM under random keys, with a fresh keystream for every image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from modeling.encryption.cipher import Sealed, check_batch, dequantize_pixels, quantize_pixels
from modeling.encryption.ised_errors import MissingKey
from modeling.encryption.primitives import EvaluationKeys, KeyOf, SubjectKey, random_key
from modeling.encryption.sealed_image import (
    LOCATOR_BYTES,
    Metadata,
    SealedImage,
    key_id_of,
    open_image,
    seal_image,
)

_NO_METADATA = Metadata()


class MemoryKeys:
    """Random keys, one per subject, kept only in this object."""

    def __init__(self) -> None:
        self._locator_key = random_key()
        self._by_subject: dict[str, SubjectKey] = {}
        self._by_id: dict[bytes, SubjectKey] = {}
        self._unused = self._new_key()

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the subject's key, created at the first call."""
        key = self._by_subject.get(subject)
        if key is None:
            key = self._new_key()
            self._by_subject[subject] = self._by_id[key.key_id] = key
        return key

    def opening_key(self, header: bytes) -> bytes:
        """Return the key that the header's locator identifies, or raise MissingKey."""
        key = self._by_id.get(key_id_of(header, self._locator_key))
        if key is None:
            raise MissingKey("no key in memory matches this image; it was sealed by another run")
        return key.key

    def another_key(self, header: bytes) -> bytes:
        """Return another subject's key; an unused key if there is only one subject."""
        own = key_id_of(header, self._locator_key)
        return next((key.key for name, key in self._by_id.items() if name != own), self._unused.key)

    def _new_key(self) -> SubjectKey:
        return SubjectKey(os.urandom(LOCATOR_BYTES), random_key(), self._locator_key)


class AeadCipher:
    """Rounds images to bytes and seals each like a file of docs/ISED.md, without the PNG."""

    name: ClassVar[str] = "aead"
    secure: ClassVar[bool] = True
    caution: ClassVar[str] = ""

    def __init__(self, keys: EvaluationKeys | None = None) -> None:
        """Use the given keys for sealing; random ones in memory by default."""
        self.keys: EvaluationKeys = MemoryKeys() if keys is None else keys

    def quantize(self, images: Tensor) -> Tensor:
        """Return the images rounded to the 256 values that a byte can represent."""
        return dequantize_pixels(quantize_pixels(images))

    def seal(self, images: Tensor, subjects: Sequence[str]) -> Sealed:
        """Encrypt images (B, 3, H, W), each under a fresh salt and its subject's key."""
        check_batch(images, subjects)
        pixels = quantize_pixels(images).cpu().numpy()
        payload = np.empty_like(pixels)
        headers = []
        for index, subject in enumerate(subjects):
            key = self.keys.sealing_key(subject)
            sealed = seal_image(key, pixels[index], _NO_METADATA)
            payload[index] = np.frombuffer(sealed.pixels, np.uint8).reshape(pixels.shape[1:])
            headers.append(sealed.chunk)
        return Sealed(torch.from_numpy(payload), tuple(headers), images.device)

    def open(self, sealed: Sealed, key_of: KeyOf) -> Tensor:
        """Decrypt all images, or none: raise MissingKey, WrongKey or Tampered."""
        ciphertext = sealed.payload.numpy()
        height, width = ciphertext.shape[1:3]
        pixels = np.empty_like(ciphertext)
        for index, header in enumerate(sealed.headers):
            image = SealedImage(width, height, header, ciphertext[index].tobytes())
            pixels[index] = open_image(key_of(header), image).pixels
        return dequantize_pixels(torch.from_numpy(pixels).to(sealed.device))

    def observe(self, sealed: Sealed) -> Tensor:
        """Return the ciphertext bytes as images."""
        return dequantize_pixels(sealed.payload.to(sealed.device))
