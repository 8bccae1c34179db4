"""What a scheme refuses: wrong keys and changed ciphertexts; and whether files keep every value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.attacks.attack import CipherAttack, Outcome, decibels, shown
from engine.attacks.context import AttackContext
from engine.attacks.levels import Stored, holds_bytes, is_ised, through_file
from engine.attacks.measures import (
    Measure,
    exactly,
    image_measures,
    interval_of,
    quality,
    share_measure,
)
from modeling.encryption.cipher import Cipher, Sealed, quantize_pixels
from modeling.encryption.ised_errors import IsedError
from modeling.encryption.keys import WrongKeys
from modeling.encryption.sealed_image import CHUNK_BYTES, PUBLIC_BYTES

_IMAGES = 200
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
        untouched, people = [], context.private.pids.tolist()
        for place in range(len(pids)):
            untouched.append(_opens(cipher, sealed.at(place)))
            partner = _partner(sealed.headers, people, place)
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
    """Writes files, reads them back, opens them, and counts values that are what they were."""

    name: ClassVar[str] = "storage"
    question: ClassVar[str] = "Do files give back every value of the image?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, pids = context.stored(level), context.private.pids[:_IMAGES]
        cipher, sealed = _sealed(stored)
        shares = []
        for place in range(len(pids)):
            back = cipher.open(through_file(sealed.at(place)), cipher.keys)
            same = quantize_pixels(back) == quantize_pixels(stored.plain[place : place + 1])
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
        other: Another image: splices come from it.
    """
    spliced = one.payload.clone()
    if holds_bytes(one):
        half = one.payload.shape[1] // 2
        spliced[:, half:] = other.payload[:, half:]
        yield "bit of a pixel flipped", lambda: through_file(_with(one, flip_bit(one.payload)))
        if one.payload.shape[1] != one.payload.shape[2]:  # a square would be unchanged
            yield "sides swapped", lambda: through_file(_with(one, _sides_swapped(one.payload)))
        for name, place in _header_places(one).items():
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
    if one.headers != other.headers:
        yield "header of another image", lambda: through_file(replace(one, headers=other.headers))


_ISED_PLACES = {
    "kind": 5,
    "salt": 8,
    "locator": 40,
    "commitment": 56,
    "metadata": PUBLIC_BYTES,
    "tag": CHUNK_BYTES - 1,
}


def _header_places(one: Sealed) -> dict[str, int]:
    """Return bytes of the header to change: one of each field where these are known."""
    last = len(one.headers[0]) - 1
    if is_ised(one):
        return _ISED_PLACES
    return {} if last < 0 else {"first header byte": 0, "last header byte": last}


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


def _partner(headers: Sequence[bytes], pids: Sequence[int], place: int) -> int:
    """Return the place of an image with another header: of the same person, or else of anybody.

    Where all headers are the same, any other image.
    """
    others = [other for other, header in enumerate(headers) if header != headers[place]]
    same = [other for other in others if pids[other] == pids[place]]
    return (same or others or [(place + 1) % len(headers)])[0]


def _sealed(stored: Stored) -> tuple[Cipher, Sealed]:
    if stored.cipher is None or stored.sealed is None:
        raise ValueError(f"nothing is encrypted at level {stored.level}")
    return stored.cipher, stored.sealed
