"""What a scheme refuses: wrong keys and changed ciphertexts; and whether files keep every value."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.attacks.base import CipherAttack, Outcome, decibels, shown
from engine.attacks.context import AttackContext
from engine.attacks.levels import Stored
from engine.attacks.results import Measure, exactly
from engine.attacks.statistics import image_measures, interval_of, quality, share_measure
from modeling.encryption.cipher import Cipher, Sealed
from modeling.encryption.errors import IsedError
from modeling.encryption.keys import WrongKeys
from modeling.encryption.levels import PixelLevels
from modeling.encryption.picture import CHUNK_BYTES, PUBLIC_BYTES, SealedPicture
from modeling.encryption.png_format import decode, encode

_IMAGES = 200
_LEVELS = PixelLevels()
_ADDITIVE_RANGE = 2.0  # image and pad are each in [-1, 1]
_NO_TRAINING = {"budget": 0, "budget_unit": "no training"}


class WrongKey(CipherAttack):
    """Somebody else's key: is it refused, and what does recovery make of what comes out?"""

    name: ClassVar[str] = "wrong-key"
    question: ClassVar[str] = "What does the holder of another person's key get?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, pids = context.stored(level), context.private.pids
        cipher, sealed = _sealed(stored)
        opened, images = open_each(cipher, sealed)
        assert context.recovery is not None
        pictures = context.bench.pictures(context.recovery, images)
        right = context.bench.pictures(context.recovery, stored.plain)
        truth, guess = context.unit(context.plain("private", "raw")), context.mean_public("raw")
        share = share_measure("opened", opened, pids, context.seed)
        measures = (share, *image_measures(pictures, truth, guess, pids, context.seed))
        refused = 1 - share.value.value
        result = context.result(
            self.name, level,
            f"Another person's key is refused for {100 * refused:.0f} % of images; what the "
            f"recovery network then draws is at {decibels(measures[1])}.",
            measures=measures,
            details={"right_key_psnr_db": float(quality(truth, right)[0].mean())}, **_NO_TRAINING,
        )  # fmt: skip
        show = shown(pids)
        columns = {
            "raw": truth[show],
            "opened wrongly": context.unit(images[show]),
            "then recovered": pictures[show],
            "with the right key": right[show],
        }
        return Outcome(result, columns)


class Malleability(CipherAttack):
    """Changes a ciphertext in many ways; checksums are repaired, as an attacker would."""

    name: ClassVar[str] = "malleability"
    question: ClassVar[str] = "Can a stored image be changed without anybody noticing?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        pids = context.private.pids[:_IMAGES]
        cipher, sealed = _sealed(context.stored(level))
        accepted: dict[str, list[bool]] = {}
        untouched = []
        for place in range(len(pids)):
            untouched.append(_opens(cipher, sealed.at(place)))
            partner = _partner(context.private.pids, place)
            for name, changed in tampered(sealed.at(place), sealed.at(partner)):
                accepted.setdefault(name, []).append(_accepts(cipher, changed))
        share = np.array(list(accepted.values()), dtype=float).mean(0)
        measure = share_measure("accepted", share, pids, context.seed)
        sentence = (
            f"Of changed ciphertexts {100 * measure.value.value:.0f} % open without complaint "
            f"({len(accepted)} kinds of change on {len(pids)} images; unchanged ones open in "
            f"{100 * np.mean(untouched):.0f} %)."
        )
        details = {
            "accepted_by_kind": {name: float(np.mean(found)) for name, found in accepted.items()},
            "untouched_accepted": float(np.mean(untouched)),
        }
        values = {"measures": (measure,), "num_images": len(pids), "details": details}
        return Outcome(context.result(self.name, level, sentence, **values, **_NO_TRAINING))


class StorageRoundTrip(CipherAttack):
    """Writes files, reads them back, opens them, and counts values that are what they were.

    The additive level is saved in the best way that 8 bits allow: its whole range on 256 steps.
    """

    name: ClassVar[str] = "storage"
    question: ClassVar[str] = "Do files give back every value of the image?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, pids = context.stored(level), context.private.pids[:_IMAGES]
        cipher, sealed = _sealed(stored)
        shares = []
        for place in range(len(pids)):
            back = cipher.open(through_file(sealed.at(place)), cipher.keys)
            same = _LEVELS.to_pixels(back) == _LEVELS.to_pixels(stored.plain[place : place + 1])
            shares.append(float(same.float().mean()))
        value = interval_of(shares, pids, context.seed)
        measure = Measure(
            "exact", "rate", value, exactly(1.0), decides=True, bad_side="below",
            floor_is_exact=True,
        )  # fmt: skip
        sentence = (
            f"After a file was written, read and opened, {100 * value.value:.1f} % of the values "
            "are what they were."
        )
        values = {"measures": (measure,), "num_images": len(pids)}
        return Outcome(context.result(self.name, level, sentence, **values, **_NO_TRAINING))


def open_each(cipher: Cipher, sealed: Sealed) -> tuple[list[bool], Tensor]:
    """Open every image with another person's key.

    Returns:
        Which were not refused, and what came out; of refused ones what an observer sees.
    """
    wrong, opened, images = WrongKeys(cipher.keys), [], []
    for one in (sealed.at(place) for place in range(len(sealed))):
        try:
            images.append(cipher.open(one, wrong))
            opened.append(True)
        except IsedError:
            images.append(cipher.observe(one))
            opened.append(False)
    return opened, torch.cat(images)


def tampered(one: Sealed, other: Sealed) -> Iterator[tuple[str, Callable[[], Sealed]]]:
    """Yield changes of one sealed image by name; each is made, through a file, when called.

    Args:
        one: The image to change.
        other: Another image of the same person, or else of anybody: splices come from it.
    """
    spliced = one.payload.clone()
    if one.payload.dtype == torch.uint8:
        half = one.payload.shape[1] // 2
        spliced[:, half:] = other.payload[:, half:]
        yield "bit of a pixel flipped", lambda: through_file(_with(one, flip_bit(one.payload)))
        if one.payload.shape[1] != one.payload.shape[2]:  # a square would be unchanged
            yield "sides swapped", lambda: through_file(_with(one, _sides_swapped(one.payload)))
        for name, place in _HEADER_PLACES.items():
            header = bytearray(one.headers[0])
            header[place] ^= 1
            changed = replace(one, headers=(bytes(header),))
            yield f"bit of the {name} flipped", lambda c=changed: through_file(c)  # type: ignore[misc]
    else:
        half = one.payload.shape[2] // 2
        spliced[:, :, half:] = other.payload[:, :, half:]
        yield "value of a pixel changed", lambda: _with(one, _value_changed(one.payload))
        yield "sign of an image flipped", lambda: _with(one, -one.payload)
    yield "half of another image put in", lambda: through_file(_with(one, spliced))
    yield "header of another image", lambda: through_file(replace(one, headers=other.headers))


_HEADER_PLACES = {
    "kind": 5,
    "salt": 8,
    "locator": 40,
    "commitment": 56,
    "metadata": PUBLIC_BYTES,
    "tag": CHUNK_BYTES - 1,
}


def through_file(sealed: Sealed) -> Sealed:
    """Write one sealed image as a file would hold it, and read it back."""
    if sealed.payload.dtype == torch.uint8:
        height, width = sealed.payload.shape[1:3]
        pixels = sealed.payload[0].numpy().tobytes()
        picture = decode(encode(SealedPicture(width, height, sealed.headers[0], pixels)))
        found = np.frombuffer(picture.pixels, np.uint8).reshape(1, height, width, 3)
        return replace(sealed, payload=torch.from_numpy(found.copy()), headers=(picture.chunk,))
    scale = 255 / (2 * _ADDITIVE_RANGE)
    steps = ((sealed.payload + _ADDITIVE_RANGE) * scale).round().clamp(0, 255).to(torch.uint8)
    stream = io.BytesIO()
    Image.fromarray(steps[0].permute(1, 2, 0).numpy()).save(stream, format="PNG")
    read = torch.from_numpy(np.array(Image.open(stream)))
    values = read.permute(2, 0, 1)[None].float() / scale - _ADDITIVE_RANGE
    return replace(sealed, payload=values)


def flip_bit(payload: Tensor) -> Tensor:
    """Return bytes with the lowest bit of the middle one changed."""
    changed = payload.clone().reshape(-1)
    changed[len(changed) // 2] ^= 1
    return changed.view_as(payload)


def _value_changed(payload: Tensor) -> Tensor:
    changed = payload.clone().reshape(-1)
    changed[len(changed) // 2] += 0.25
    return changed.view_as(payload)


def _sides_swapped(payload: Tensor) -> Tensor:
    """Return the same bytes as an image of the other proportions."""
    count, height, width, channels = payload.shape
    return payload.reshape(count, width, height, channels)


def _with(sealed: Sealed, payload: Tensor) -> Sealed:
    return replace(sealed, payload=payload)


def _accepts(cipher: Cipher, change: Callable[[], Sealed]) -> bool:
    try:
        return _opens(cipher, change())
    except IsedError:
        return False


def _opens(cipher: Cipher, sealed: Sealed) -> bool:
    try:
        cipher.open(sealed, cipher.keys)
    except IsedError:
        return False
    return True


def _partner(pids: Tensor, place: int) -> int:
    """Return the place of another image of the same person, or else of anybody."""
    same = ((pids == pids[place]) & (torch.arange(len(pids)) != place)).nonzero().squeeze(1)
    return int(same[0]) if len(same) else (place + 1) % len(pids)


def _sealed(stored: Stored) -> tuple[Cipher, Sealed]:
    if stored.cipher is None or stored.sealed is None:
        raise ValueError(f"nothing is encrypted at level {stored.level}")
    return stored.cipher, stored.sealed
