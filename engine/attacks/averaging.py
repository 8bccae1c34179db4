"""Cryptanalysis with several ciphertexts of one person and no key: what they share is the pad."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from engine.attacks.base import TRIAL_IMAGES, CipherAttack, Outcome, pictures_sentence, shown
from engine.attacks.context import AttackContext
from engine.attacks.filters import PAD_REACH, gaussian
from engine.attacks.levels import Stored
from engine.attacks.people import MINIMUM_PERSONS
from engine.attacks.results import Point
from engine.attacks.statistics import image_measures, quality

MOST_IMAGES = 10
_TARGETS = 2  # images of each person that it is scored on
_SIGMAS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


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
            pictures_sentence(measures, f"From {most} ciphertexts of one person, without a key"),
            measures=measures, num_images=len(target), budget=most,
            budget_unit="ciphertexts of each person",
            curve_of="ciphertexts of one person", curve=tuple(points), details={"sigma_px": sigmas},
        )  # fmt: skip
        return Outcome(result, columns)


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


def _best_sigma(stored: Stored, count: int, context: AttackContext) -> float:
    """Return the low-pass that opens public images best, stored under keys of one's own."""
    pids = context.validation.pids
    most = int(torch.unique(pids, return_counts=True)[1].max())
    target, groups = (part[:TRIAL_IMAGES] for part in groups_of(pids, min(count, most)))
    truth = context.unit(stored.plain[target])

    def score(sigma: float) -> float:
        opened = context.unit(remove_shared(stored.observed, groups, sigma))
        return float(quality(truth, opened)[0].mean())

    return max(_SIGMAS, key=score)
