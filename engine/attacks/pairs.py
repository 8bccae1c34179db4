"""Attacks with two ciphertexts of one identity: known plaintext, and the difference.

A scheme may combine image and key stream by addition, exclusive or, or addition modulo 256. The
attacker tries each operation on public images under keys of the attacker, and uses the best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from engine.attacks.attack import (
    TRIAL_IMAGES,
    CipherAttack,
    Outcome,
    example_images,
    image_sentence,
)
from engine.attacks.context import AttackContext
from engine.attacks.levels import Stored, stores_bytes
from engine.attacks.measures import (
    Measure,
    image_measures,
    interval_of,
    permutation_interval,
    permute_identities,
    quality,
)
from modeling.encryption.cipher import dequantize_pixels, quantize_pixels
from utils.seeding import numpy_generator

# (observed target, observed known image, known image) -> target
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


def subtract(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Subtract the key stream that was added to the known image."""
    return target - (known - plain)


def exclusive_or(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Remove a key stream that was combined with bytes by exclusive or."""
    a, b, c = (_bytes(images) for images in (target, known, plain))
    return _images(a ^ b ^ c)


def modular(target: Tensor, known: Tensor, plain: Tensor) -> Tensor:
    """Remove a key stream that was added to bytes modulo 256."""
    a, b, c = (_bytes(images).int() for images in (target, known, plain))
    return _images(((a - b + c) % 256).to(torch.uint8))


COMBINATIONS: dict[str, Combine] = {
    "subtraction": subtract,
    "exclusive or": exclusive_or,
    "modular subtraction": modular,
}


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the difference of two images."""
    return first - second


def modular_difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the difference of bytes modulo 256, from -128 to 127."""
    apart = (_bytes(first).int() - _bytes(second).int()) % 256
    return torch.where(apart > 127, apart - 256, apart).float()


def differing_bits(first: Tensor, second: Tensor) -> Tensor:
    """Return the exclusive or of bytes, as a number."""
    return (_bytes(first) ^ _bytes(second)).float()


DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": difference,
    "modular difference": modular_difference,
    "exclusive or": differing_bits,
}


def applicable(names: dict[str, Callable[..., Tensor]], stored: Stored) -> list[str]:
    """Return the operations that apply: all for bytes, the first for other numbers."""
    is_bytes = stored.sealed is not None and stores_bytes(stored.sealed)
    return list(names) if is_bytes else list(names)[:1]


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Pearson's r of each pair of images, float32 (N,); 0 if one is constant."""
    a, b = (x.float().flatten(1) for x in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    size = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(size > 0, (a * b).sum(1) / size.clamp_min(1e-30), 0.0)


def _bytes(images: Tensor) -> Tensor:
    """Return images as bytes (N, 3, H, W)."""
    return quantize_pixels(images).permute(0, 3, 1, 2)


def _images(pixels: Tensor) -> Tensor:
    return dequantize_pixels(pixels.permute(0, 2, 3, 1))


_PAIRS = 8  # differences per identity
_PERMUTATIONS = 100
_BUDGET = {"budget": 1, "budget_unit": "known image of each identity"}


class KnownPlaintext(CipherAttack):
    """Opens images of an identity with one known image and its ciphertext.

    The known pair gives a key stream, which is applied to the other ciphertexts. The operation is
    chosen on held-out public images under keys of the attacker. The known image itself resembles
    the others, so it is the guess without the stored image. The floor is the same attack on
    ciphertexts of other identities.
    """

    name: ClassVar[str] = "known-plaintext"
    question: ClassVar[str] = "Does one opened image of an identity open the others?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        method = max(
            applicable(COMBINATIONS, trial),
            key=lambda name: _opening_quality(trial, context.validation.pids, name, context),
        )
        stored, pids = context.stored(level), context.private.pids
        target, known = known_pairs(pids)
        opened = context.unit(_open(stored, target, known, method))
        truth = context.unit(stored.plain[target])
        # The attacker knows this image without any other ciphertext.
        guess = context.unit(stored.plain[known])
        measures = image_measures(
            opened, truth, guess, pids[target], context.seed,
            with_others=lambda index: context.unit(_open(stored, target[index], known, method)),
        )  # fmt: skip
        result = context.result(
            self.name, level, image_sentence(measures, "With one known image of an identity"),
            measures=measures, num_images=len(target), details={"algebra": method}, **_BUDGET,
        )  # fmt: skip
        show = example_images(pids[target])
        columns = {
            "known image": context.unit(stored.plain[known[show]]),
            "other ciphertext": context.unit(stored.observed[target[show]]),
            "opened with it": opened[show],
            "truth": truth[show],
        }
        return Outcome(result, columns)


class Difference(CipherAttack):
    """Compares the difference of two ciphertexts of an identity with that of the images.

    Both use the same operation, which is chosen on held-out public images.
    """

    name: ClassVar[str] = "difference"
    question: ClassVar[str] = "Does the difference of two ciphertexts equal that of the images?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        method = max(
            applicable(DIFFERENCES, trial),
            key=lambda name: _correlation(trial, context.validation.pids, name),
        )
        stored, pids = context.stored(level), context.private.pids
        first, second = same_identity(pids)
        observed = DIFFERENCES[method](stored.observed[first], stored.observed[second])
        plain = DIFFERENCES[method](stored.plain[first], stored.plain[second])
        value = interval_of(correlation(observed, plain).numpy(), pids[first], context.seed)
        rng = numpy_generator(context.seed, "deals of differences")  # the name is part of the seed
        permuted = [
            float(correlation(observed, plain[torch.from_numpy(index)]).mean())
            for index in permute_identities(pids[first], _PERMUTATIONS, rng)
        ]
        measure = Measure("correlation", "r", value, permutation_interval(permuted), decides=True)
        sentence = (
            "The difference of two ciphertexts of an identity correlates with the difference of "
            f"the images by {value.value:.3f} (1: the whole outline, 0: nothing)."
        )
        result = context.result(
            self.name, level, sentence, measures=(measure,), num_images=len(first),
            budget=2, budget_unit="ciphertexts of each identity", details={"algebra": method},
        )  # fmt: skip
        show = example_images(pids[first])
        columns = {
            "first image": context.unit(stored.plain[first[show]]),
            "second image": context.unit(stored.plain[second[show]]),
            "their difference": _stretched(plain[show]),
            "of ciphertexts": _stretched(observed[show]),
        }
        return Outcome(result, columns)


def known_pairs(pids: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of images to open, and of the known image of each one's identity."""
    target, known = [], []
    for pid in torch.unique(pids):
        own = (pids == pid).nonzero().squeeze(1)
        target.append(own[1:])
        known.append(own[:1].expand(len(own) - 1))
    return torch.cat(target), torch.cat(known)


def same_identity(pids: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of pairs of images of one identity, some pairs for each identity."""
    firsts, seconds = [], []
    for pid in torch.unique(pids):
        own = (pids == pid).nonzero().squeeze(1)[: _PAIRS + 1]
        firsts.append(own[:-1])
        seconds.append(own[1:])
    return torch.cat(firsts), torch.cat(seconds)


def _open(stored: Stored, target: Tensor, known: Tensor, method: str) -> Tensor:
    observed = stored.observed
    return COMBINATIONS[method](observed[target], observed[known], stored.plain[known])


def _opening_quality(stored: Stored, pids: Tensor, method: str, context: AttackContext) -> float:
    target, known = (index[:TRIAL_IMAGES] for index in known_pairs(pids))
    opened = context.unit(_open(stored, target, known, method))
    return float(quality(context.unit(stored.plain[target]), opened)[0].mean())


def _correlation(stored: Stored, pids: Tensor, method: str) -> float:
    first, second = (index[:TRIAL_IMAGES] for index in same_identity(pids))
    observed = DIFFERENCES[method](stored.observed[first], stored.observed[second])
    plain = DIFFERENCES[method](stored.plain[first], stored.plain[second])
    return float(correlation(observed, plain).mean())


def _stretched(values: Tensor) -> Tensor:
    """Return values scaled to [0, 1] for display."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-6)
