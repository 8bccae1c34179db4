"""Filters of an attacker: low-pass, median and mid-range, on normalised images (N, 3, H, W).

Cryptanalysis with several ciphertexts of one person and no key: what they share is the pad.

Single-image denoisers: one ciphertext, no key, no network.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.attacks.attack import (
    TRIAL_IMAGES,
    CipherAttack,
    Outcome,
    decibels,
    pictures_sentence,
    shown,
    shows_own,
)
from engine.attacks.context import AttackContext
from engine.attacks.levels import MINIMUM_PERSONS, Stored
from engine.attacks.measures import Point, image_measures, quality

PAD_REACH = 1.0  # the published pad is uniform in [-1, 1], and so is the range of plain images
_MEDIAN_CHUNK = 16


class Filter(Protocol):
    """Turns images into images of the same shape."""

    def __call__(self, images: Tensor) -> Tensor:
        """Filter images (N, 3, H, W)."""
        ...


def gaussian(images: Tensor, sigma: float) -> Tensor:
    """Return a Gaussian blur; edges are repeated."""
    reach = max(1, round(3 * sigma))
    place = torch.arange(-reach, reach + 1, dtype=torch.float32)
    taps = torch.exp(-place.square() / (2 * sigma * sigma))
    taps = (taps / taps.sum()).to(images.device)
    count, channels, height, width = images.shape
    planes = images.reshape(count * channels, 1, height, width)
    planes = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    planes = F.conv2d(planes, taps.view(1, 1, 1, -1))
    return F.conv2d(planes, taps.view(1, 1, -1, 1)).view(count, channels, height, width)


def high_pass(images: Tensor) -> Tensor:
    """Return what a narrow Gaussian blur takes away: noise, and fine edges."""
    return images - gaussian(images, 1.0)


def median(images: Tensor, size: int) -> Tensor:
    """Return the median of each size x size window; edges are repeated."""
    reach = size // 2
    parts = []
    for part in images.split(_MEDIAN_CHUNK):
        padded = F.pad(part, (reach,) * 4, mode="replicate")
        windows = padded.unfold(2, size, 1).unfold(3, size, 1)
        parts.append(windows.flatten(-2).median(-1).values)
    return torch.cat(parts)


def block_mid_range(images: Tensor, size: int) -> Tensor:
    """Return the middle between least and greatest value of each block, over the whole block.

    For a constant block under uniform noise that estimate is far better than the mean: its error
    falls with the number of pixels, not with its root.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % size, 0, -height % size), mode="replicate")
    middle = (F.max_pool2d(padded, size) - F.max_pool2d(-padded, size)) / 2
    spread = F.interpolate(middle, scale_factor=float(size), mode="nearest")
    return spread[..., :height, :width]


def within_pad(estimate: Tensor, observed: Tensor) -> Tensor:
    """Cut an estimate to what a pad in [-1, 1] allows: no further than 1 from what is seen."""
    low = (observed - PAD_REACH).clamp(-1, 1)
    high = (observed + PAD_REACH).clamp(-1, 1)
    return torch.minimum(torch.maximum(estimate, low), high)


def filter_bank() -> dict[str, Filter]:
    """Return the denoisers that an attacker tries, by name."""
    bank: dict[str, Filter] = {}
    for sigma in (1, 2, 3, 4, 6, 8, 12):
        bank[f"gaussian {sigma}"] = partial(gaussian, sigma=float(sigma))
    for size in (3, 5, 7):
        bank[f"median {size}"] = partial(median, size=size)
    for size in (4, 6, 8, 12, 16, 24):
        bank[f"mid-range of {size} x {size}"] = partial(block_mid_range, size=size)
    return bank


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


_TRIAL_IMAGES = 64


class Denoisers(CipherAttack):
    """The best of a bank of filters; which it is, is found on public persons under own keys."""

    name: ClassVar[str] = "denoise"
    question: ClassVar[str] = "Does filtering the noise of one ciphertext show the image?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        truth = context.unit(trial.plain[:_TRIAL_IMAGES])
        bank = {
            name: float(quality(truth, context.unit(denoise(seen, name)))[0].mean())
            for seen in (trial.observed[:_TRIAL_IMAGES],)
            for name in filter_bank()
        }
        best = max(bank, key=lambda name: bank[name])
        stored, pids = context.stored(level), context.private.pids
        opened, truth = context.unit(denoise(stored.observed, best)), context.unit(stored.plain)
        guess = context.mean_public("anonymized")
        measures = image_measures(opened, truth, guess, pids, context.seed)
        own = "shows the very image" if shows_own(measures) else "shows nothing of the image"
        result = context.result(
            self.name, level,
            f"The best of {len(bank)} noise filters ({best}) {own}: {decibels(measures[0])}.",
            measures=measures, budget=len(bank), budget_unit="filters tried on public images",
            details={"best": best, "trial_psnr_db": bank},
        )  # fmt: skip
        show = shown(pids)
        columns = {
            "before encryption": truth[show],
            "ciphertext": context.unit(stored.observed[show]),
            "filtered": opened[show],
            "blind guess": guess.expand_as(truth[show]),
        }
        return Outcome(result, columns)


def denoise(observed: Tensor, name: str) -> Tensor:
    """Filter images (N, 3, H, W) and keep the result within what a pad in [-1, 1] allows."""
    filtered = torch.cat([filter_bank()[name](part) for part in observed.split(64)])
    return within_pad(filtered, observed)
