"""What is stored at each level of protection, and what an outsider sees of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.attacks.people import ImageSet
from engine.train_step import Autocast
from layers.pixels import PixelSpace
from modeling.encryption.additive import NotSecureWarning
from modeling.encryption.build import CIPHERS
from modeling.encryption.cipher import Cipher, Sealed

CLEAR_LEVELS = ("raw", "desensitized", "anonymized")
ENCRYPTED_LEVELS = tuple(CIPHERS)  # no scheme is left out
LEVELS = (*CLEAR_LEVELS, *ENCRYPTED_LEVELS)

# An attacker's own identity numbers: no data set has them, so none of his pads is a private one.
_OWN_PERSONS = 1_000_000_000


@dataclass(frozen=True, eq=False)
class Stored:
    """N images as they are stored at one level.

    Attributes:
        level: Name of the level.
        plain: Normalised images before encryption, float32 (N, 3, H, W), as a key gives them back.
        observed: What an outsider sees, normalised, float32 (N, 3, H, W).
        cipher: The scheme with its owner's keys; None at levels without encryption.
        sealed: The ciphertexts; None likewise.
    """

    level: str
    plain: Tensor
    observed: Tensor
    cipher: Cipher | None = None
    sealed: Sealed | None = None


@dataclass(frozen=True)
class Protector:
    """Turns raw images into what is stored.

    Attributes:
        anonymizer: The public anonymizer; None if the checkpoint has none.
        device: Where it runs.
        autocast: Context that it runs in.
        pixels: Pixel space of its images.
        batch_size: Images per batch.
    """

    anonymizer: nn.Module | None
    device: torch.device
    autocast: Autocast
    pixels: PixelSpace
    batch_size: int

    @torch.inference_mode()
    def plain(self, images: ImageSet, level: str) -> Tensor:
        """Return the images of a level before encryption, normalised, float32, on the CPU."""
        if level in ("raw", "desensitized"):
            return self.pixels.normalize(images.raw if level == "raw" else images.desensitized)
        if self.anonymizer is None:
            raise ValueError(f"level {level} needs an anonymizer")
        parts = []
        for batch in self.pixels.normalize(images.raw).split(self.batch_size):
            with self.autocast():
                anonymized = self.anonymizer(batch.to(self.device))
            parts.append(anonymized.float().cpu())
        return torch.cat(parts)


def seal(level: str, plain: Tensor, subjects: Sequence[str]) -> Stored:
    """Store plain images (N, 3, H, W) at a level, each under the key of its subject."""
    if level in CLEAR_LEVELS:
        return Stored(level, plain, plain)
    cipher = new_cipher(level)
    sealed = cipher.seal(plain, subjects)
    return Stored(level, cipher.quantize(plain), cipher.observe(sealed), cipher, sealed)


def new_cipher(level: str) -> Cipher:
    """Return a cipher with keys of its own."""
    with warnings.catch_warnings():  # that it is not secure is what is measured here
        warnings.simplefilter("ignore", NotSecureWarning)
        return CIPHERS[level]()


def own_subjects(persons: Sequence[int]) -> tuple[str, ...]:
    """Return labels of persons that an attacker makes up, to encrypt under keys of his own."""
    return tuple(f"attacker/own/{_OWN_PERSONS + int(person)}" for person in persons)


def own_key_per_person(level: str, plain: Tensor, pids: Tensor) -> Stored:
    """Store public images as an attacker imitates the owner: a key of his own for each person."""
    return seal(level, plain, own_subjects(pids.tolist()))


def fresh_observer(level: str) -> Callable[[Tensor], Tensor]:
    """Return what shows plain images as an outsider would see them, each under a new own key."""
    count = 0

    def observe(plain: Tensor) -> Tensor:
        nonlocal count
        if level in CLEAR_LEVELS:
            return plain
        persons = range(count, count + len(plain))
        count += len(plain)
        return seal(level, plain, own_subjects(persons)).observed

    return observe
