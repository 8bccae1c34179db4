"""How much of what an attacker reached is more than luck: intervals, and the floor below them.

Intervals are 95 % bootstrap intervals over persons. Floors are measured, not assumed: the same
attack is scored on answers that were dealt to the wrong persons. Where the stored images carry
nothing about the person, right and wrong deals cannot be told apart, whatever the network or the
picture prior; so no bias of an attack can pass for a leak, and none can hide one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.attacks.results import Measure
from engine.scoring.bootstrap import Interval, bootstrap_ratios
from engine.scoring.image_quality import QualityAccumulator
from utils.seeding import numpy_generator

# One image equal to its target would make every mean infinite; float32 ends near 158 dB.
PSNR_CAP_DB = 200.0
_IMAGE_DEALS = 12

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


def interval_of(values: ArrayLike, pids: Tensor, seed: int) -> Interval:
    """Return the mean of one value per image with its interval over persons."""
    column = np.asarray(values, np.float64).reshape(-1, 1)
    (found,) = bootstrap_ratios(column, np.ones(len(column)), pids.cpu().numpy(), seed=seed)
    return found


def deal_interval(means: ArrayLike) -> Interval:
    """Return the mean over deals, and between which bounds 95 % of them lie."""
    values = np.asarray(means, np.float64)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def deal_to_others(pids: Tensor, deals: int, rng: np.random.Generator) -> Places:
    """Return for each deal and image the place of an image of somebody else (deals, N)."""
    people = pids.cpu().numpy()
    dealt = np.empty((deals, len(people)), np.int64)
    for person in np.unique(people):
        mine, others = np.flatnonzero(people == person), np.flatnonzero(people != person)
        dealt[:, mine] = rng.choice(others, (deals, len(mine)))
    return dealt


def quality(truth: Tensor, images: Tensor) -> tuple[Floats, Floats]:
    """Return PSNR (dB) and SSIM of each image; both (N, 3, H, W) are cut to [0, 1] first.

    What is no number counts as grey, which an attacker would put there: one NaN would make all
    means NaN, and those lie beyond no floor.
    """
    if not len(truth):
        return np.zeros(0), np.zeros(0)
    accumulator = QualityAccumulator()
    drawn = images.nan_to_num(0.5, posinf=1.0, neginf=0.0).expand_as(truth).clamp(0, 1)
    accumulator.update(truth.clamp(0, 1), drawn)
    found = accumulator.per_image()
    psnr = np.minimum(found.psnr_db.cpu().numpy(), PSNR_CAP_DB)
    return psnr, found.ssim.cpu().numpy()


def image_measures(
    attacked: Tensor,
    truth: Tensor,
    guess: Tensor,
    pids: Tensor,
    seed: int,
    *,
    with_others: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Measure, ...]:
    """Score pictures that an attacker made of N stored images.

    Args:
        attacked: His pictures, values in [0, 1] (N, 3, H, W).
        truth: What they should show (N, 3, H, W).
        guess: What somebody who does not see the stored image would answer, (1, 3, H, W) or one
            for each, such as the mean public picture.
        pids: Person of each image (N,).
        seed: Of resampling and dealing.
        with_others: Repeats the attack with stored images of other persons, at these places (N,),
            in place of the own ones; all else that the attacker knows stays. Left out: his pictures
            depend on nothing else, and are dealt themselves.

    Returns:
        ``psnr`` and ``ssim`` beside those of the guess, and what decides: ``psnr_own_gain`` and
        ``ssim_own_gain``, how much closer each picture is to its own target than pictures that the
        attacker made of other persons' stored images are.
    """
    psnr, ssim = quality(truth, attacked)
    guessed = quality(truth, guess)
    rng = numpy_generator(seed, "deals of pictures")
    dealt = deal_to_others(pids, _IMAGE_DEALS, rng)
    remade = with_others or (lambda places: attacked[places])
    others = np.array([quality(truth, remade(torch.from_numpy(deal))) for deal in dealt])
    measures = []
    for kind, (name, unit, own) in enumerate((("psnr", "dB", psnr), ("ssim", "ssim", ssim))):
        value, floor = (interval_of(v, pids, seed) for v in (own, guessed[kind]))
        measures.append(Measure(name, unit, value, floor))
        means = others[:, kind]  # (deals, N)
        gain = interval_of(own - means.mean(0), pids, seed)
        # A deal against the mean of the others, as the own answer is against the mean of all.
        rest = (means.sum(0) - means) / (_IMAGE_DEALS - 1)
        chance = deal_interval((means - rest).mean(1))
        measures.append(Measure(f"{name}_own_gain", unit, gain, chance, decides=True))
    return tuple(measures)


def share_measure(
    name: str, values: ArrayLike, pids: Tensor, seed: int, floor: float = 0.0
) -> Measure:
    """Return a share of images, or a rate per image, beside a floor that is known exactly."""
    known = Interval(floor, floor, floor)
    value = interval_of(values, pids, seed)
    return Measure(name, "rate", value, known, decides=True, floor_is_exact=True)
