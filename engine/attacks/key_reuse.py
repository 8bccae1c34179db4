"""Attacks on the key stream that ciphertexts of one identity share, and single-image denoisers.

Averaging and denoisers filter normalised images (N, 3, H, W). Known plaintext and the difference
use two ciphertexts of one identity. A scheme may combine image and key stream by addition,
exclusive or, or addition modulo 256: the attacker tries each operation on public images under keys
of the attacker, and uses the best.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from scipy.ndimage import median_filter
from torch import Tensor
from torch.nn import functional as F

from engine.attacks.attack import (
    TRIAL_IMAGES,
    AttackContext,
    CipherAttack,
    Outcome,
    decibels,
    example_images,
    image_sentence,
    images_by_identity,
    reveals_own_identity,
)
from engine.attacks.levels import MIN_IDENTITIES, Stored, stores_bytes
from engine.attacks.measures import (
    CurvePoint,
    Measure,
    image_measures,
    interval_of,
    permutation_interval,
    permute_identities,
    quality,
)
from modeling.encryption.cipher import dequantize_pixels, quantize_pixels
from utils.seeding import numpy_generator

PAD_REACH = 1.0  # the published pad is uniform in [-1, 1], and so is the range of plain images


Filter = Callable[[Tensor], Tensor]  # from images (N, 3, H, W) to images of the same shape


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
    return torch.from_numpy(median_filter(images.numpy(), (1, 1, size, size), mode="nearest"))


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

    name = "averaging"
    question = "Do several ciphertexts of one identity reveal its image?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored, pids = context.stored(level), context.private.pids
        trial, guess = context.imitated("validation", level), context.mean_public("anonymized")
        camids, counts = context.private.camids, image_counts(pids)
        most, _ = groups_of(pids, counts[-1])
        examples = most[example_images(pids[most])]  # of identities that have enough images
        points, columns, sigmas = [], {}, {}
        for count in counts:
            sigma = _best_sigma(trial, count, context)
            target, groups = groups_of(pids, count)
            opened = context.unit(remove_shared(stored.observed, groups, sigma))
            truth = context.unit(stored.plain[target])
            measures = image_measures(
                opened, truth, guess, pids[target], camids[target], context.seed
            )
            points.append(CurvePoint(count, measures))
            sigmas[str(count)] = sigma
            show = (target == examples[:, None]).nonzero()[:, 1]
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
        return context.outcome(
            self, level,
            image_sentence(measures, f"From {count} ciphertexts of one identity, without a key"),
            columns=columns, measures=measures, num_images=len(target), budget=count,
            num_persons=len(torch.unique(pids[target])),
            budget_unit="ciphertexts of each identity",
            curve_of="ciphertexts of one identity", curve=tuple(points),
            details={"sigma_px": sigmas},
        )  # fmt: skip


def image_counts(pids: Tensor) -> range:
    """Return 1..n with n at most ten, so that enough identities have n images."""
    counts = torch.sort(torch.unique(pids, return_counts=True)[1], descending=True).values
    enough = int(counts[min(MIN_IDENTITIES, len(counts)) - 1])
    return range(1, min(MOST_IMAGES, enough) + 1)


def groups_of(pids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return indices of target images (T,), and of n images of the same identity (T, n).

    The target is the first of its group. Identities with fewer than ``count`` images are left out.
    """
    rows = [
        own.roll(-start)[:count]
        for own in images_by_identity(pids)
        if len(own) >= count
        for start in range(min(_TARGETS, len(own)))
    ]
    groups = torch.stack(rows)
    return groups[:, 0], groups


def remove_shared(observed: Tensor, groups: Tensor, sigma: float) -> Tensor:
    """Estimate the first image of each group (T, n) by subtracting what the group shares.

    The groups are indices of observed images (N, 3, H, W). A filter of width ``sigma`` (px)
    separates images from the pad.
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

    name = "denoise"
    question = "Does a noise filter reveal the image in one ciphertext?"

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
        stored, pids, camids = context.stored(level), context.private.pids, context.private.camids
        opened, truth = context.unit(denoise(stored.observed, best)), context.unit(stored.plain)
        guess = context.mean_public("anonymized")
        measures = image_measures(opened, truth, guess, pids, camids, context.seed)
        revealed = "reveals" if reveals_own_identity(measures) else "does not reveal"
        show = example_images(pids)
        columns = {
            "before encryption": truth[show],
            "ciphertext": context.unit(stored.observed[show]),
            "filtered": opened[show],
            "guess without the image": guess.expand_as(truth[show]),
        }
        return context.outcome(
            self, level,
            f"The best of {len(bank)} noise filters ({best}) {revealed} the image: "
            f"{decibels(measures[0])}.",
            columns=columns, measures=measures, budget=len(bank),
            budget_unit="filters tried on public images",
            details={"best": best, "trial_psnr_db": bank},
        )  # fmt: skip


def denoise(observed: Tensor, name: str) -> Tensor:
    """Filter images (N, 3, H, W), and clip the result to what a pad in [-1, 1] allows."""
    filtered = torch.cat([filter_bank()[name](part) for part in observed.split(64)])
    return within_pad(filtered, observed)


# Each returns the target, given the observed target, the observed known image and the known image:
# it removes a key stream that was added to values, combined with bytes by exclusive or, or added to
# bytes modulo 256.
COMBINATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "subtraction": lambda target, known, plain: target - (known - plain),
    "exclusive or": lambda target, known, plain: _images(
        _bytes(target) ^ _bytes(known) ^ _bytes(plain)
    ),
    "modular subtraction": lambda target, known, plain: _images(
        _bytes(target) - _bytes(known) + _bytes(plain)
    ),
}

# The difference of two images by the inverse of each operation; modular ones are -128 to 127.
DIFFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "difference": lambda first, second: first - second,
    "modular difference": lambda first, second: (
        (_bytes(first) - _bytes(second)).view(torch.int8).float()
    ),
    "exclusive or": lambda first, second: (_bytes(first) ^ _bytes(second)).float(),
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
    """Return images as bytes (N, 3, H, W); sums and differences of bytes are modulo 256."""
    return quantize_pixels(images).permute(0, 3, 1, 2)


def _images(pixels: Tensor) -> Tensor:
    return dequantize_pixels(pixels.permute(0, 2, 3, 1))


_PAIRS = 8  # differences per identity
_PERMUTATIONS = 100


class KnownPlaintext(CipherAttack):
    """Opens images of an identity with one known image and its ciphertext.

    The known pair gives a key stream, which is applied to the other ciphertexts. The operation is
    chosen on held-out public images under keys of the attacker. The known image itself resembles
    the others, so it is the guess without the stored image. The floor is the same attack on
    ciphertexts of other identities.
    """

    name = "known-plaintext"
    question = "Does one opened image of an identity open the others?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        pairs = known_pairs(context.validation.pids)
        trial_target, trial_known = (index[:TRIAL_IMAGES] for index in pairs)
        trial_truth = context.unit(trial.plain[trial_target])

        def trial_psnr(name: str) -> float:
            opened = context.unit(_open(trial, trial_target, trial_known, name))
            return float(quality(trial_truth, opened)[0].mean())

        method = max(applicable(COMBINATIONS, trial), key=trial_psnr)
        stored, pids, camids = context.stored(level), context.private.pids, context.private.camids
        target, known = known_pairs(pids)
        opened = context.unit(_open(stored, target, known, method))
        truth = context.unit(stored.plain[target])
        # The attacker knows this image without any other ciphertext.
        guess = context.unit(stored.plain[known])
        measures = image_measures(
            opened, truth, guess, pids[target], camids[target], context.seed,
            with_others=lambda index: context.unit(_open(stored, target[index], known, method)),
        )  # fmt: skip
        show = example_images(pids[target])
        columns = {
            "known image": context.unit(stored.plain[known[show]]),
            "other ciphertext": context.unit(stored.observed[target[show]]),
            "opened with it": opened[show],
            "truth": truth[show],
        }
        return context.outcome(
            self, level, image_sentence(measures, "With one known image of an identity"),
            columns=columns, measures=measures, num_images=len(target),
            details={"algebra": method}, budget=1, budget_unit="known image of each identity",
        )  # fmt: skip


class Difference(CipherAttack):
    """Compares the difference of two ciphertexts of an identity with that of the images.

    Both use the same operation, which is chosen on held-out public images.
    """

    name = "difference"
    question = "Does the difference of two ciphertexts equal that of the images?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        trial = context.imitated("validation", level)
        trial_pairs = tuple(i[:TRIAL_IMAGES] for i in same_identity(context.validation.pids))
        method = max(
            applicable(DIFFERENCES, trial),
            key=lambda name: float(correlation(*_differences(trial, trial_pairs, name)).mean()),
        )
        stored, pids = context.stored(level), context.private.pids
        first, second = same_identity(pids)
        observed, plain = _differences(stored, (first, second), method)
        value = interval_of(correlation(observed, plain).numpy(), pids[first], context.seed)
        rng = numpy_generator(context.seed, "deals of differences")  # the name is part of the seed
        permuted = [
            float(correlation(observed, plain[torch.from_numpy(index)]).mean())
            for index in permute_identities(
                pids[first], _PERMUTATIONS, rng, context.private.camids[first]
            )
        ]
        measure = Measure("correlation", "r", value, permutation_interval(permuted), decides=True)
        sentence = (
            "The difference of two ciphertexts of an identity correlates with the difference of "
            f"the images by {value.value:.3f} (1: the whole outline, 0: nothing)."
        )
        show = example_images(pids[first])
        columns = {
            "first image": context.unit(stored.plain[first[show]]),
            "second image": context.unit(stored.plain[second[show]]),
            "their difference": _stretched(plain[show]),
            "of ciphertexts": _stretched(observed[show]),
        }
        return context.outcome(
            self, level, sentence, columns=columns, measures=(measure,), num_images=len(first),
            budget=2, budget_unit="ciphertexts of each identity", details={"algebra": method},
        )  # fmt: skip


def known_pairs(pids: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of images to open, and of the known image of each one's identity."""
    identities = images_by_identity(pids)
    known = [own[:1].expand(len(own) - 1) for own in identities]
    return torch.cat([own[1:] for own in identities]), torch.cat(known)


def same_identity(pids: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of pairs of images of one identity, some pairs for each identity."""
    identities = [own[: _PAIRS + 1] for own in images_by_identity(pids)]
    return torch.cat([own[:-1] for own in identities]), torch.cat([own[1:] for own in identities])


def _open(stored: Stored, target: Tensor, known: Tensor, method: str) -> Tensor:
    observed = stored.observed
    return COMBINATIONS[method](observed[target], observed[known], stored.plain[known])


def _differences(stored: Stored, pairs: tuple[Tensor, ...], method: str) -> tuple[Tensor, Tensor]:
    """Return the differences of pairs of images, observed and before encryption."""
    first, second = pairs
    observed, plain = (
        DIFFERENCES[method](images[first], images[second])
        for images in (stored.observed, stored.plain)
    )
    return observed, plain


def _stretched(values: Tensor) -> Tensor:
    """Return values scaled to [0, 1] for display."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(1e-6)
