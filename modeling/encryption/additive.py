"""The published scheme: a pad generated from the identity number, added in normalised space.

It is not secure. It is kept because the published tables were made with it. One pair of an image
and its ciphertext opens every other image of that person, and the repeated pad identifies the
person even without a key: docs/ISED.md.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modeling.encryption.cipher import Sealed, check_batch
from modeling.encryption.primitives import EvaluationKeys, KeyOf, SubjectKey

_KEY_BYTES = 8
# 50 MB at 256 x 128. An evaluation visits the images of a person in a row, so few pads are in use.
_CACHED_PADS = 128


class NotSecureWarning(UserWarning):
    """Issued once per process if the scheme in use is not secure."""


class PublishedKeys:
    """The published key of a person: the identity number, which anyone can guess."""

    def sealing_key(self, subject: str) -> SubjectKey:
        """Return the identity number, the last field of the label, as the key."""
        return SubjectKey(key_id=subject.encode(), key=_key(subject))

    def opening_key(self, header: bytes) -> bytes:
        """Return the key of the label in the header."""
        return _key(header.decode())

    def another_key(self, header: bytes) -> bytes:
        """Return the key of the next identity number."""
        return _key(header.decode(), step=1)


class AdditiveCipher:
    """C = P + pad, pad = 2 torch.rand(3, H, W, generator=manual_seed(pid)) - 1 on the CPU."""

    name: ClassVar[str] = "additive"
    secure: ClassVar[bool] = False
    caution: ClassVar[str] = (
        "wrong, ciphertext: all images of a person have the same pad, so noise matches noise; high"
        "  protected -> protected rates are this leak, not re-ID"
    )
    _warned: ClassVar[bool] = False

    def __init__(self) -> None:
        """Warn, once per process, that the scheme is not secure."""
        self.keys: EvaluationKeys = PublishedKeys()
        self._pad = functools.lru_cache(_CACHED_PADS)(_pad)
        if not AdditiveCipher._warned:
            AdditiveCipher._warned = True
            warnings.warn(
                "the encryption scheme 'additive' is the published pad and is not secure: use it "
                "only to reproduce the published tables, and 'aead' for everything else",
                NotSecureWarning,
                stacklevel=2,
            )

    def quantize(self, images: Tensor) -> Tensor:
        """Return the images as float32, without rounding."""
        return images.float()

    def seal(self, images: Tensor, subjects: Sequence[str]) -> Sealed:
        """Add each subject's pad to images (B, 3, H, W)."""
        check_batch(images, subjects)
        keys = [self.keys.sealing_key(subject) for subject in subjects]
        payload = self._add_pads(images, [key.key for key in keys], sign=1.0)
        headers = tuple(key.key_id for key in keys)
        return Sealed(payload, headers, images.device)

    def open(self, sealed: Sealed, key_of: KeyOf) -> Tensor:
        """Subtract the pads of the given keys; a wrong key returns garbage, not an error."""
        return self._add_pads(sealed.payload, [key_of(x) for x in sealed.headers], sign=-1.0)

    def observe(self, sealed: Sealed) -> Tensor:
        """Return the padded images."""
        return sealed.payload

    def _add_pads(self, images: Tensor, keys: Sequence[bytes], *, sign: float) -> Tensor:
        """Return images + sign * pads in float32, also within autocast."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        with torch.autocast(images.device.type, enabled=False):
            if not keys:
                return images.float()
            # A batch contains few identities: copy each pad to the device only once.
            row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
            pads = torch.stack([self._pad(key, height, width) for key in row_of])
            rows = torch.tensor([row_of[key] for key in keys])
            pads, rows = (x.to(images.device, non_blocking=True) for x in (pads, rows))
            return torch.add(images.float(), pads.index_select(0, rows), alpha=sign)


def _pad(key: bytes, height: int, width: int) -> Tensor:
    """Return a pad (3, H, W), float32 on the CPU; the global generator is not used."""
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big", signed=True))
    return 2 * torch.rand(3, height, width, generator=generator, dtype=torch.float32) - 1


def _key(subject: str, step: int = 0) -> bytes:
    """Return the key for the identity number of a label, plus a step."""
    try:
        pid = int(subject.rsplit("/", 1)[-1]) + step
    except ValueError:
        raise ValueError(
            f"subject {subject!r} does not end in an identity number; expected dataset/split/pid "
            "for the encryption scheme additive, or use aead"
        ) from None
    return pid.to_bytes(_KEY_BYTES, "big", signed=True)
