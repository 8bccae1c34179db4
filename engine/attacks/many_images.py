"""Cryptanalysis with several ciphertexts of one person: known plaintext, averaging, difference."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from engine.attacks.base import CipherAttack, Outcome, decibels, shown, shows_own
from engine.attacks.byte_algebra import COMBINATIONS, DIFFERENCES, correlation, usable
from engine.attacks.context import AttackContext
from engine.attacks.filters import PAD_REACH, gaussian
from engine.attacks.levels import Stored
from engine.attacks.people import MINIMUM_PERSONS
from engine.attacks.results import Measure, Point
from engine.attacks.statistics import (
    deal_interval,
    deal_to_others,
    image_measures,
    interval_of,
    quality,
)
from utils.seeding import numpy_generator

MOST_IMAGES = 10
_TARGETS = 2  # images of each person that averaging is scored on
_PAIRS = 8  # differences per person
_TRIAL_IMAGES = 128
_SIGMAS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
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
            self.name, level, _sentence(measures, "With one known image of a person"),
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


class Averaging(CipherAttack):
    """Several ciphertexts of one person and no key: what they share is the pad.

    The mean of n ciphertexts is the mean image, which is smooth, plus the pad, which is not. What a
    low-pass takes from it is the pad, cut to what the pad's range and the images' range allow. The
    width of the low-pass is found on held-out public persons under keys of the attacker's own.
    """

    name: ClassVar[str] = "averaging"
    question: ClassVar[str] = "Do several ciphertexts of one person, without any key, open?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, pids = context.stored(level), context.private.pids
        trial, guess = context.imitated("validation", level), context.mean_public("anonymized")
        points, columns, sigmas = [], {}, {}
        for count in image_counts(pids):
            sigma = _best_sigma(trial, count, context)
            target, groups = groups_of(pids, count)
            opened = context.unit(remove_shared(stored.observed, groups, sigma))
            truth = context.unit(stored.plain[target])
            points.append(
                Point(count, image_measures(opened, truth, guess, pids[target], context.seed))
            )
            sigmas[str(count)] = sigma
            show = shown(pids[target])
            if count == 1:
                columns = {
                    "before encryption": truth[show],
                    "ciphertext": context.unit(stored.observed[target[show]]),
                    "from 1": opened[show],
                }
        columns |= {"from many": opened[show], "blind guess": guess.expand_as(truth[show])}
        measures, most = points[-1].measures, int(points[-1].x)
        result = context.result(
            self.name, level,
            _sentence(measures, f"From {most} ciphertexts of one person, without a key"),
            measures=measures, num_images=len(target), budget=most,
            budget_unit="ciphertexts of each person",
            curve_of="ciphertexts of one person", curve=tuple(points), details={"sigma_px": sigmas},
        )  # fmt: skip
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


def image_counts(pids: Tensor) -> range:
    """Return 1..n, n at most ten and so that enough persons have n images."""
    counts = torch.sort(torch.unique(pids, return_counts=True)[1], descending=True).values
    enough = int(counts[min(MINIMUM_PERSONS, len(counts)) - 1])
    return range(1, min(MOST_IMAGES, enough) + 1)


def groups_of(pids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return target images (T,) and for each ``count`` images of its person, itself first (T, n).

    Persons with fewer images are left out.
    """
    rows = []
    for pid in torch.unique(pids):
        mine = (pids == pid).nonzero().squeeze(1)
        if len(mine) >= count:
            rows += [mine.roll(-start)[:count] for start in range(min(_TARGETS, len(mine)))]
    groups = torch.stack(rows)
    return groups[:, 0], groups


def remove_shared(observed: Tensor, groups: Tensor, sigma: float) -> Tensor:
    """Estimate the first image of each group by taking off what the group's images share.

    Args:
        observed: What is seen of all images, normalised (N, 3, H, W).
        groups: Places of n images of one person each, the target first (T, n).
        sigma: Width of the low-pass that tells images from the pad (px).
    """
    estimates = []
    for group in groups:
        seen = observed[group]
        mean = seen.mean(0, keepdim=True)
        pad = mean - gaussian(mean, sigma)
        low = (seen.amax(0, keepdim=True) - 1).clamp_min(-PAD_REACH)
        high = (seen.amin(0, keepdim=True) + 1).clamp_max(PAD_REACH)
        estimates.append(seen[:1] - torch.minimum(torch.maximum(pad, low), high))
    return torch.cat(estimates)


def _open(stored: Stored, target: Tensor, known: Tensor, method: str) -> Tensor:
    seen = stored.observed
    return COMBINATIONS[method](seen[target], seen[known], stored.plain[known])


def _opening_quality(stored: Stored, pids: Tensor, method: str, context: AttackContext) -> float:
    target, known = (places[:_TRIAL_IMAGES] for places in known_pairs(pids))
    opened = context.unit(_open(stored, target, known, method))
    return float(quality(context.unit(stored.plain[target]), opened)[0].mean())


def _best_sigma(stored: Stored, count: int, context: AttackContext) -> float:
    """Return the low-pass that opens public images best, stored under keys of one's own."""
    pids = context.validation.pids
    most = int(torch.unique(pids, return_counts=True)[1].max())
    target, groups = (part[:_TRIAL_IMAGES] for part in groups_of(pids, min(count, most)))
    truth = context.unit(stored.plain[target])

    def score(sigma: float) -> float:
        opened = context.unit(remove_shared(stored.observed, groups, sigma))
        return float(quality(truth, opened)[0].mean())

    return max(_SIGMAS, key=score)


def _correlation(stored: Stored, pids: Tensor, method: str) -> float:
    first, second = (places[:_TRIAL_IMAGES] for places in same_person(pids))
    seen = DIFFERENCES[method](stored.observed[first], stored.observed[second])
    plain = DIFFERENCES[method](stored.plain[first], stored.plain[second])
    return float(correlation(seen, plain).mean())


def _stretched(values: Tensor) -> Tensor:
    """Return values between 0 and 1, to be looked at."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-6)


def _sentence(measures: tuple[Measure, ...], start: str) -> str:
    own = (
        "they show the very person"
        if shows_own(measures)
        else "they show no more of the person than of anybody else"
    )
    return f"{start}, pictures come out at {decibels(measures[0])}; {own}."
