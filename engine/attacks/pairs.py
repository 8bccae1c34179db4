"""How two ciphertexts under one key may be set against each other, for every scheme.

An attacker does not know in advance which algebra a scheme gives way to. He tries each on images of
his own, under keys of his own, and takes the one that works best.

Cryptanalysis with two ciphertexts of one person: known plaintext, and their difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from engine.attacks.attack import TRIAL_IMAGES, CipherAttack, Outcome, pictures_sentence, shown
from engine.attacks.context import AttackContext
from engine.attacks.levels import Stored, holds_bytes
from engine.attacks.measures import (
    Measure,
    deal_interval,
    deal_to_others,
    image_measures,
    interval_of,
    quality,
)
from modeling.encryption.cipher import dequantize_pixels, quantize_pixels
from utils.seeding import numpy_generator

# (what is seen of the target, what is seen of the known image, the known image) -> the target
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def subtract(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Take what was added to the known image off the target."""
    return target - (known - plain)


def exclusive_or(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Take a key stream that was XORed to bytes off the target."""
    one, two, three = (_bytes(images) for images in (target, known, plain))
    return _images(one ^ two ^ three)


def modular(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Take a key stream that was added to bytes modulo 256 off the target."""
    one, two, three = (_bytes(images).int() for images in (target, known, plain))
    return _images(((one - two + three) % 256).to(torch.uint8))


COMBINATIONS: dict[str, Combine] = {
    "subtraction": subtract,
    "exclusive or": exclusive_or,
    "modular subtraction": modular,
}


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the difference of two images."""
    return first - second


def modular_difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the difference of bytes modulo 256, as a number from -128 to 127."""
    apart = (_bytes(first).int() - _bytes(second).int()) % 256
    return torch.where(apart > 127, apart - 256, apart).float()


def differing_bits(first: Tensor, second: Tensor) -> Tensor:
    """Return the exclusive or of bytes as a number."""
    return (_bytes(first) ^ _bytes(second)).float()


DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": difference,
    "modular difference": modular_difference,
    "exclusive or": differing_bits,
}


def usable(names: dict[str, Callable[..., Tensor]], stored: Stored) -> list[str]:
    """Return the algebras that fit what is stored: bytes have all, other numbers the first."""
    is_bytes = stored.sealed is not None and holds_bytes(stored.sealed)
    return list(names) if is_bytes else list(names)[:1]


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's r of each pair of images, float32 (N,); 0 where one is constant."""
    one, two = (x.float().flatten(1) for x in (first, second))
    one, two = one - one.mean(1, keepdim=True), two - two.mean(1, keepdim=True)
    size = one.norm(dim=1) * two.norm(dim=1)
    return torch.where(size > 0, (one * two).sum(1) / size.clamp_min(1e-30), 0.0)


def _bytes(images: Tensor) -> Tensor:
    """Return bytes in the layout of images (N, 3, H, W)."""
    return quantize_pixels(images).permute(0, 3, 1, 2)


def _images(pixels: Tensor) -> Tensor:
    return dequantize_pixels(pixels.permute(0, 2, 3, 1))


_PAIRS = 8  # differences per person
_DEALS = 100
_NO_TRAINING = {"budget": 1, "budget_unit": "known image of each person"}


class KnownPlaintext(CipherAttack):
    """One image of a person is known with its ciphertext: what do the person's others give away?

    From the known pair follows a key stream, which is tried on the other ciphertexts. Which
    algebra the stream obeys is found on held-out public persons under keys of the attacker's own.
    The known image may resemble the others by itself: it is the blind guess, and the floor is the
    same attack on ciphertexts of other persons, with the known pair kept.
    """

    name: ClassVar[str] = "known-plaintext"
    question: ClassVar[str] = "Does one opened image of a person open the others?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        method = max(
            usable(COMBINATIONS, trial),
            key=lambda name: _opening_quality(trial, context.validation.pids, name, context),
        )
        stored, pids = context.stored(level), context.private.pids
        target, known = known_pairs(pids)
        opened = context.unit(_open(stored, target, known, method))
        truth = context.unit(stored.plain[target])
        # He knows one image of the person: that he has before he sees any other ciphertext.
        guess = context.unit(stored.plain[known])
        measures = image_measures(
            opened, truth, guess, pids[target], context.seed,
            with_others=lambda deal: context.unit(_open(stored, target[deal], known, method)),
        )  # fmt: skip
        result = context.result(
            self.name, level, pictures_sentence(measures, "With one known image of a person"),
            measures=measures, num_images=len(target), details={"algebra": method}, **_NO_TRAINING,
        )  # fmt: skip
        show = shown(pids[target])
        columns = {
            "known image": context.unit(stored.plain[known[show]]),
            "other ciphertext": context.unit(stored.observed[target[show]]),
            "opened with it": opened[show],
            "truth": truth[show],
        }
        return Outcome(result, columns)


class Difference(CipherAttack):
    """The difference of two ciphertexts of a person beside that of the two images.

    Both are taken in the same algebra, which is found on held-out public persons.
    """

    name: ClassVar[str] = "difference"
    question: ClassVar[str] = "Is the difference of two ciphertexts that of the images?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        method = max(
            usable(DIFFERENCES, trial),
            key=lambda name: _correlation(trial, context.validation.pids, name),
        )
        stored, pids = context.stored(level), context.private.pids
        first, second = same_person(pids)
        seen = DIFFERENCES[method](stored.observed[first], stored.observed[second])
        plain = DIFFERENCES[method](stored.plain[first], stored.plain[second])
        value = interval_of(correlation(seen, plain).numpy(), pids[first], context.seed)
        rng = numpy_generator(context.seed, "deals of differences")
        deals = [
            float(correlation(seen, plain[torch.from_numpy(deal)]).mean())
            for deal in deal_to_others(pids[first], _DEALS, rng)
        ]
        measure = Measure("correlation", "r", value, deal_interval(deals), decides=True)
        sentence = (
            "Subtracting two ciphertexts of a person gives the difference of the two images with a "
            f"correlation of {value.value:.3f} (1 is the whole outline, 0 nothing)."
        )
        result = context.result(
            self.name, level, sentence, measures=(measure,), num_images=len(first),
            budget=2, budget_unit="ciphertexts of each person", details={"algebra": method},
        )  # fmt: skip
        show = shown(pids[first])
        columns = {
            "first image": context.unit(stored.plain[first[show]]),
            "second image": context.unit(stored.plain[second[show]]),
            "their difference": _stretched(plain[show]),
            "of ciphertexts": _stretched(seen[show]),
        }
        return Outcome(result, columns)


def known_pairs(pids: Tensor) -> tuple[Tensor, Tensor]:
    """Return places of images to open, and for each that of the person's known image."""
    target, known = [], []
    for pid in torch.unique(pids):
        mine = (pids == pid).nonzero().squeeze(1)
        target.append(mine[1:])
        known.append(mine[:1].expand(len(mine) - 1))
    return torch.cat(target), torch.cat(known)


def same_person(pids: Tensor) -> tuple[Tensor, Tensor]:
    """Return pairs of places of two images of one person, some for each."""
    firsts, seconds = [], []
    for pid in torch.unique(pids):
        mine = (pids == pid).nonzero().squeeze(1)[: _PAIRS + 1]
        firsts.append(mine[:-1])
        seconds.append(mine[1:])
    return torch.cat(firsts), torch.cat(seconds)


def _open(stored: Stored, target: Tensor, known: Tensor, method: str) -> Tensor:
    seen = stored.observed
    return COMBINATIONS[method](seen[target], seen[known], stored.plain[known])


def _opening_quality(stored: Stored, pids: Tensor, method: str, context: AttackContext) -> float:
    target, known = (places[:TRIAL_IMAGES] for places in known_pairs(pids))
    opened = context.unit(_open(stored, target, known, method))
    return float(quality(context.unit(stored.plain[target]), opened)[0].mean())


def _correlation(stored: Stored, pids: Tensor, method: str) -> float:
    first, second = (places[:TRIAL_IMAGES] for places in same_person(pids))
    seen = DIFFERENCES[method](stored.observed[first], stored.observed[second])
    plain = DIFFERENCES[method](stored.plain[first], stored.plain[second])
    return float(correlation(seen, plain).mean())


def _stretched(values: Tensor) -> Tensor:
    """Return values between 0 and 1, to be looked at."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-6)
