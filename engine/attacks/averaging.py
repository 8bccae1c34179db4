"""Attacks by filtering: averaging over ciphertexts of one identity, and single-image denoisers.

Filters work on normalised images (N, 3, H, W).
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
    example_images,
    image_sentence,
    reveals_own_identity,
)
from engine.attacks.context import AttackContext
from engine.attacks.levels import MIN_IDENTITIES, Stored
from engine.attacks.measures import CurvePoint, image_measures, quality

PAD_REACH = 1.0  # the published pad is uniform in [-1, 1], and so is the range of plain images
_MEDIAN_CHUNK = 16


class Filter(Protocol):
    """A function from images to images of the same shape."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the filtered images (N, 3, H, W)."""
        ...


def gaussian(images: Tensor, sigma: float) -> Tensor:
    """Return images blurred by a Gaussian; edge pixels are repeated."""
    reach = max(1, round(3 * sigma))
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32)
    taps = torch.exp(-offset.square() / (2 * sigma * sigma))
    taps = (taps / taps.sum()).to(images.device)
    count, channels, height, width = images.shape
    planes = images.reshape(count * channels, 1, height, width)
    planes = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    planes = F.conv2d(planes, taps.view(1, 1, 1, -1))
    return F.conv2d(planes, taps.view(1, 1, -1, 1)).view(count, channels, height, width)


def high_pass(images: Tensor) -> Tensor:
    """Return images minus their Gaussian blur of sigma 1: noise and fine edges."""
    return images - gaussian(images, 1.0)


def median(images: Tensor, size: int) -> Tensor:
    """Return the median of each size x size window; edge pixels are repeated."""
    reach = size // 2
    parts = []
    for part in images.split(_MEDIAN_CHUNK):
        padded = F.pad(part, (reach,) * 4, mode="replicate")
        windows = padded.unfold(2, size, 1).unfold(3, size, 1)
        parts.append(windows.flatten(-2).median(-1).values)
    return torch.cat(parts)


def block_mid_range(images: Tensor, size: int) -> Tensor:
    """Return each block filled with the mean of its minimum and maximum.

    For a constant block under uniform noise this estimate is far better than the mean: its error
    falls with the number of pixels, not with the square root.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % size, 0, -height % size), mode="replicate")
    middle = (F.max_pool2d(padded, size) - F.max_pool2d(-padded, size)) / 2
    blocks = F.interpolate(middle, scale_factor=float(size), mode="nearest")
    return blocks[..., :height, :width]


def within_pad(estimate: Tensor, observed: Tensor) -> Tensor:
    """Clip an estimate to what a pad in [-1, 1] allows: at most 1 from the observed value."""
    low = (observed - PAD_REACH).clamp(-1, 1)
    high = (observed + PAD_REACH).clamp(-1, 1)
    return torch.minimum(torch.maximum(estimate, low), high)


def filter_bank() -> dict[str, Filter]:
    """Return all denoising filters by name."""
    bank: dict[str, Filter] = {}
    for sigma in (1, 2, 3, 4, 6, 8, 12):
        bank[f"gaussian {sigma}"] = partial(gaussian, sigma=float(sigma))
    for size in (3, 5, 7):
        bank[f"median {size}"] = partial(median, size=size)
    for size in (4, 6, 8, 12, 16, 24):
        bank[f"mid-range of {size} x {size}"] = partial(block_mid_range, size=size)
    return bank


MOST_IMAGES = 10
_TARGETS = 2  # scored images of each identity
_SIGMAS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


class Averaging(CipherAttack):
    """Estimates the pad from several ciphertexts of one identity, without a key.

    The mean of n ciphertexts is the mean image, which is smooth, plus the pad, which is not. The
    pad is estimated by a high-pass, clipped to the ranges of pad and images. The width of the
    filter is chosen on held-out public images under keys of the attacker.
    """

    name: ClassVar[str] = "averaging"
    question: ClassVar[str] = "Do several ciphertexts of one identity reveal its image?"

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
                CurvePoint(count, image_measures(opened, truth, guess, pids[target], context.seed))
            )
            sigmas[str(count)] = sigma
            show = example_images(pids[target])
            if count == 1:
                columns = {
                    "before encryption": truth[show],
                    "ciphertext": context.unit(stored.observed[target[show]]),
                    "from 1": opened[show],
                }
        columns |= {
            "from many": opened[show],
            "guess without the image": guess.expand_as(truth[show]),
        }
        measures, most = points[-1].measures, int(points[-1].x)
        result = context.result(
            self.name, level,
            image_sentence(measures, f"From {most} ciphertexts of one identity, without a key"),
            measures=measures, num_images=len(target), budget=most,
            budget_unit="ciphertexts of each identity",
            curve_of="ciphertexts of one identity", curve=tuple(points),
            details={"sigma_px": sigmas},
        )  # fmt: skip
        return Outcome(result, columns)


def image_counts(pids: Tensor) -> range:
    """Return 1..n with n at most ten, so that enough identities have n images."""
    counts = torch.sort(torch.unique(pids, return_counts=True)[1], descending=True).values
    enough = int(counts[min(MIN_IDENTITIES, len(counts)) - 1])
    return range(1, min(MOST_IMAGES, enough) + 1)


def groups_of(pids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return indices of target images (T,), and of n images of the same identity (T, n).

    The target is the first of its group. Identities with fewer than ``count`` images are left out.
    """
    rows = []
    for pid in torch.unique(pids):
        mine = (pids == pid).nonzero().squeeze(1)
        if len(mine) >= count:
            rows += [mine.roll(-start)[:count] for start in range(min(_TARGETS, len(mine)))]
    groups = torch.stack(rows)
    return groups[:, 0], groups


def remove_shared(observed: Tensor, groups: Tensor, sigma: float) -> Tensor:
    """Estimate the first image of each group by subtracting what the group shares.

    Args:
        observed: Observed images, normalised (N, 3, H, W).
        groups: Indices of n images of one identity, the target first (T, n).
        sigma: Width of the filter that separates images from the pad (px).
    """
    estimates = []
    for group in groups:
        ciphertexts = observed[group]
        mean = ciphertexts.mean(0, keepdim=True)
        pad = mean - gaussian(mean, sigma)
        low = (ciphertexts.amax(0, keepdim=True) - 1).clamp_min(-PAD_REACH)
        high = (ciphertexts.amin(0, keepdim=True) + 1).clamp_max(PAD_REACH)
        estimates.append(ciphertexts[:1] - torch.minimum(torch.maximum(pad, low), high))
    return torch.cat(estimates)


def _best_sigma(stored: Stored, count: int, context: AttackContext) -> float:
    """Return the filter width that works best on public images under keys of the attacker."""
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
    """Filters one ciphertext; the best filter is chosen on public images under attacker keys."""

    name: ClassVar[str] = "denoise"
    question: ClassVar[str] = "Does a noise filter reveal the image in one ciphertext?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        truth = context.unit(trial.plain[:_TRIAL_IMAGES])
        observed = trial.observed[:_TRIAL_IMAGES]
        bank = {
            name: float(quality(truth, context.unit(denoise(observed, name)))[0].mean())
            for name in filter_bank()
        }
        best = max(bank, key=lambda name: bank[name])
        stored, pids = context.stored(level), context.private.pids
        opened, truth = context.unit(denoise(stored.observed, best)), context.unit(stored.plain)
        guess = context.mean_public("anonymized")
        measures = image_measures(opened, truth, guess, pids, context.seed)
        revealed = "reveals" if reveals_own_identity(measures) else "does not reveal"
        result = context.result(
            self.name, level,
            f"The best of {len(bank)} noise filters ({best}) {revealed} the image: "
            f"{decibels(measures[0])}.",
            measures=measures, budget=len(bank), budget_unit="filters tried on public images",
            details={"best": best, "trial_psnr_db": bank},
        )  # fmt: skip
        show = example_images(pids)
        columns = {
            "before encryption": truth[show],
            "ciphertext": context.unit(stored.observed[show]),
            "filtered": opened[show],
            "guess without the image": guess.expand_as(truth[show]),
        }
        return Outcome(result, columns)


def denoise(observed: Tensor, name: str) -> Tensor:
    """Filter images (N, 3, H, W), and clip the result to what a pad in [-1, 1] allows."""
    filtered = torch.cat([filter_bank()[name](part) for part in observed.split(64)])
    return within_pad(filtered, observed)
