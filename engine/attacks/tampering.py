"""Attacks with wrong keys and changed ciphertexts, and the round trip through files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.attacks.attack import (
    UNTRAINED,
    AttackContext,
    CipherAttack,
    Outcome,
    decibels,
    example_images,
)
from engine.attacks.levels import is_ised, stores_bytes, through_file
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
from modeling.encryption.sealed_image import CHUNK_BYTES, PUBLIC_BYTES

_IMAGES = 200


class WrongKey(CipherAttack):
    """Opens images with another identity's key, and recovers the result."""

    name = "wrong-key"
    question = "What does the holder of another identity's key get?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, pids = context.stored(level), context.private.pids
        opened, images = open_each(*stored.encrypted)
        recovered = context.bench.pictures(context.recovery, images)
        right = context.bench.pictures(context.recovery, stored.plain)
        truth, guess = context.unit(context.plain("private", "raw")), context.mean_public("raw")
        share = share_measure("opened", opened, pids, context.seed)
        camids = context.private.camids
        measures = (share, *image_measures(recovered, truth, guess, pids, camids, context.seed))
        refused = 1 - share.value.value
        show = example_images(pids)
        columns = {
            "raw": truth[show],
            "opened with a wrong key": context.unit(images[show]),
            "then recovered": recovered[show],
            "with the right key": right[show],
        }
        return context.outcome(
            self, level,
            f"Another identity's key is rejected for {100 * refused:.0f} % of images; the output "
            f"of the recovery network is then at {decibels(measures[1])}.",
            columns=columns, measures=measures,
            details={"right_key_psnr_db": float(quality(truth, right)[0].mean())}, **UNTRAINED,
        )  # fmt: skip


class Malleability(CipherAttack):
    """Changes ciphertexts in many ways, and repairs the checksums."""

    name = "malleability"
    question = "Can a stored image be changed without detection?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        pids = context.private.pids[:_IMAGES]
        cipher, sealed = context.stored(level).encrypted
        accepted: dict[str, list[bool]] = {}
        untouched, identities = [], context.private.pids.tolist()
        for index in range(len(pids)):
            untouched.append(_opens(cipher, partial(sealed.at, index)))
            partner = _partner(sealed.headers, identities, index)
            for name, changed in tampered(sealed.at(index), sealed.at(partner)):
                accepted.setdefault(name, []).append(_opens(cipher, changed))
        share = np.array(list(accepted.values()), dtype=float).mean(0)
        measure = share_measure("accepted", share, pids, context.seed)
        sentence = (
            f"{100 * measure.value.value:.0f} % of changed ciphertexts open without an error "
            f"({len(accepted)} kinds of change on {len(pids)} images; unchanged ones open in "
            f"{100 * np.mean(untouched):.0f} %)."
        )
        details = {
            "accepted_by_kind": {name: float(np.mean(values)) for name, values in accepted.items()},
            "untouched_accepted": float(np.mean(untouched)),
        }
        return context.outcome(
            self, level, sentence, measures=(measure,), num_images=len(pids), details=details,
            num_persons=len(torch.unique(pids)), **UNTRAINED,
        )  # fmt: skip


class StorageRoundTrip(CipherAttack):
    """Writes, reads and opens files, and counts unchanged values."""

    name = "storage"
    question = "Do files keep every value of the image?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, pids = context.stored(level), context.private.pids[:_IMAGES]
        cipher, sealed = stored.encrypted
        shares = []
        for index in range(len(pids)):
            opened = cipher.open(through_file(sealed.at(index)), cipher.keys.opening_key)
            same = quantize_pixels(opened) == quantize_pixels(stored.plain[index : index + 1])
            shares.append(float(same.float().mean()))
        value = interval_of(shares, pids, context.seed)
        measure = Measure(
            "exact", "rate", value, exactly(1.0), decides=True, bad_side="below",
            floor_is_exact=True,
        )  # fmt: skip
        sentence = (
            f"After writing, reading and opening a file, {100 * value.value:.1f} % of the values "
            "are unchanged."
        )
        return context.outcome(
            self, level, sentence, measures=(measure,), num_images=len(pids),
            num_persons=len(torch.unique(pids)), **UNTRAINED,
        )  # fmt: skip


def open_each(cipher: Cipher, sealed: Sealed) -> tuple[list[bool], Tensor]:
    """Open every image with another identity's key.

    Returns whether each image opened, and the images (N, 3, H, W): ciphertexts where it did not.
    """
    opened, images = [], []
    for image in (sealed.at(index) for index in range(len(sealed))):
        try:
            images.append(cipher.open(image, cipher.keys.another_key))
            opened.append(True)
        except IsedError:
            images.append(cipher.observe(image))
            opened.append(False)
    return opened, torch.cat(images)


def tampered(image: Sealed, other: Sealed) -> Iterator[tuple[str, Callable[[], Sealed]]]:
    """Yield changes of a sealed image: a name, and a function that returns the changed image."""
    spliced = image.payload.clone()
    if stores_bytes(image):
        count, height, width, channels = image.payload.shape
        spliced[:, height // 2 :] = other.payload[:, height // 2 :]
        yield (
            "bit of a pixel flipped",
            lambda: through_file(
                _with(image, changed_middle(image.payload, lambda value: value ^ 1))
            ),
        )
        if height != width:  # no change to a square
            swapped = image.payload.reshape(count, width, height, channels)
            yield "sides swapped", lambda: through_file(_with(image, swapped))
        for name, offset in _header_offsets(image).items():
            header = bytearray(image.headers[0])
            header[offset] ^= 1
            changed = replace(image, headers=(bytes(header),))
            yield f"bit of the {name} flipped", partial(through_file, changed)
    else:
        half = image.payload.shape[2] // 2
        spliced[:, :, half:] = other.payload[:, :, half:]
        yield (
            "value of a pixel changed",
            lambda: _with(image, changed_middle(image.payload, lambda value: value + 0.25)),
        )
        yield "sign of an image flipped", lambda: _with(image, -image.payload)
    yield "half of another image", lambda: through_file(_with(image, spliced))
    if image.headers != other.headers:
        yield "header of another image", lambda: through_file(replace(image, headers=other.headers))


_ISED_OFFSETS = {
    "kind": 5,
    "salt": 8,
    "locator": 40,
    "commitment": 56,
    "metadata": PUBLIC_BYTES,
    "tag": CHUNK_BYTES - 1,
}


def _header_offsets(image: Sealed) -> dict[str, int]:
    """Return offsets of header bytes to change: one of each field if the format is known."""
    last = len(image.headers[0]) - 1
    if is_ised(image):
        return _ISED_OFFSETS
    return {} if last < 0 else {"first header byte": 0, "last header byte": last}


def changed_middle(payload: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a payload in which the middle value is changed."""
    changed = payload.clone(memory_format=torch.contiguous_format)
    values = changed.view(-1)
    values[len(values) // 2] = change(values[len(values) // 2])
    return changed


def _with(sealed: Sealed, payload: Tensor) -> Sealed:
    return replace(sealed, payload=payload)


def _opens(cipher: Cipher, changed: Callable[[], Sealed]) -> bool:
    try:
        cipher.open(changed(), cipher.keys.opening_key)
    except IsedError:
        return False
    return True


def _partner(headers: Sequence[bytes], pids: Sequence[int], index: int) -> int:
    """Return the index of an image with another header, if possible of the same identity.

    If all headers are equal, returns the next image.
    """
    others = [other for other, header in enumerate(headers) if header != headers[index]]
    same = [other for other in others if pids[other] == pids[index]]
    return (same or others or [(index + 1) % len(headers)])[0]
