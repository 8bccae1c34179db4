"""How much of what an attacker reached is more than luck: intervals, and the floor below them.

Intervals are 95 % bootstrap intervals over persons. Floors are measured, not assumed: the same
attack is scored on answers that were dealt to the wrong persons. Where the stored images carry
nothing about the person, right and wrong deals cannot be told apart, whatever the network or the
picture prior; so no bias of an attack can pass for a leak, and none can hide one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.attacks.results import Measure
from engine.scoring.bootstrap import Interval, bootstrap_ratios
from engine.scoring.features import Features, UnitFeatures
from engine.scoring.image_quality import QualityAccumulator
from utils.errors import UserError
from utils.seeding import numpy_generator

# One image equal to its target would make every mean infinite; float32 ends near 158 dB.
PSNR_CAP_DB = 200.0
_IMAGE_DEALS = 12
_RETRIEVAL_DEALS = 100

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
    """Return PSNR (dB) and SSIM of each image; both (N, 3, H, W) are cut to [0, 1] first."""
    if not len(truth):
        return np.zeros(0), np.zeros(0)
    accumulator = QualityAccumulator()
    accumulator.update(truth.clamp(0, 1), images.expand_as(truth).clamp(0, 1))
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


def link_measures(
    query: Features,
    gallery: Features,
    seed: int,
    *,
    cross_camera: bool,
    prefix: str = "",
    names: Sequence[str] = ("rank1", "mAP"),
) -> tuple[Measure, ...]:
    """Score how well queries find images of their person, beside the same queries dealt anew.

    The floor is the score of queries that changed places with others of their camera: what a
    network makes of cameras and favourite gallery images stays, the persons go.

    Args:
        query: What is looked with.
        gallery: What is looked through.
        seed: Of resampling and dealing.
        cross_camera: Whether gallery images of a query's own camera are ignored.
        prefix: Put before the names of the measures.
        names: Which scores of ``PairRules.scores``.

    Returns:
        A measure for each name; all decide.
    """
    return similarity_measures(
        cosines(query, gallery),
        query,
        gallery,
        seed,
        cross_camera=cross_camera,
        prefix=prefix,
        names=names,
    )


def similarity_measures(
    similarity: Tensor,
    query: Features,
    gallery: Features,
    seed: int,
    *,
    cross_camera: bool,
    prefix: str = "",
    names: Sequence[str] = ("rank1", "mAP"),
) -> tuple[Measure, ...]:
    """Do as :func:`link_measures` for similarities (Q, G); embeddings are not read."""
    matching = PairRules.of(query, gallery, cross_camera=cross_camera)
    pids = query.pids.cpu()[matching.scored]

    def scores(order: Places) -> dict[str, Floats]:
        found = matching.scores(similarity[torch.from_numpy(order)])
        return {name: found[name] for name in names}

    own = scores(np.arange(len(query)))
    rng = numpy_generator(seed, "deals of queries")
    deals = [scores(_within_cameras(query.camids, rng)) for _ in range(_RETRIEVAL_DEALS)]
    return tuple(
        Measure(
            f"{prefix}{name}",
            "rate",
            interval_of(values, pids, seed),
            deal_interval([float(deal[name].mean()) for deal in deals]),
            decides=True,
        )
        for name, values in own.items()
    )


@dataclass(frozen=True, eq=False)
class PairRules:
    """Which gallery images a query has to find, and which it does not look at, as whole tables.

    ``engine.scoring`` never holds such tables; here the same rules are applied to a hundred deals
    of few images, and holding them is many times as fast.

    Attributes:
        matches: Gallery images to find, bool (S, G), for each of the S scored queries.
        valid: Gallery images that are ranked, bool (S, G).
        scored: Places of the queries that have a match (S,).
    """

    matches: Tensor
    valid: Tensor
    scored: Tensor

    @classmethod
    def of(cls, query: Features, gallery: Features, *, cross_camera: bool) -> PairRules:
        """Apply the rules of Market-1501 (as ``engine.scoring.matching``); nobody here is junk.

        Raises:
            UserError: No query has a match.
        """
        same = query.pids.cpu()[:, None] == gallery.pids.cpu()[None]
        ignored = torch.zeros_like(same)
        if cross_camera:
            ignored = same & (query.camids.cpu()[:, None] == gallery.camids.cpu()[None])
        matches = same & ~ignored
        scored = matches.any(1).nonzero().squeeze(1)
        if not len(scored):
            raise UserError(
                "no private query has an image to find under another camera; expected persons seen "
                "by two cameras, or TEST.CROSS_CAMERA False"
            )
        return cls(matches[scored], ~ignored[scored], scored)

    def scores(self, similarity: Tensor) -> dict[str, Floats]:
        """Score similarities of all queries and gallery images (Q, G).

        Returns:
            ``rank1``, ``mAP`` and ``auc`` of each scored query (S,); the last is the chance that a
            match is closer than an image of somebody else. Ties go to the earlier gallery image.
        """
        rows = similarity[self.scored].masked_fill(~self.valid, -torch.inf)
        order = rows.argsort(dim=1, descending=True, stable=True)
        hits = self.matches.gather(1, order).double()
        found, rank = hits.cumsum(1), torch.arange(1, hits.shape[1] + 1)
        number = hits.sum(1)
        others = (self.valid.sum(1) - number).clamp_min(1)
        before = ((rank - found) * hits).sum(1)  # others ahead of each match
        values = {
            "rank1": hits[:, 0],
            "mAP": (hits * found / rank).sum(1) / number,
            "auc": 1 - before / number / others,
        }
        return {name: value.numpy() for name, value in values.items()}


def share_measure(
    name: str, values: ArrayLike, pids: Tensor, seed: int, floor: float = 0.0
) -> Measure:
    """Return a share of images, or a rate per image, beside a floor that is known exactly."""
    known = Interval(floor, floor, floor)
    return Measure(name, "rate", interval_of(values, pids, seed), known, decides=True)


def cosines(query: Features, gallery: Features) -> Tensor:
    """Return the cosine of every query and gallery image, float32 (Q, G) on the CPU.

    A broken row (NaN, infinite, zero) has cosine 0 to all.
    """
    sides = []
    for side in (query, gallery):
        unit = UnitFeatures.of(side)
        sides.append(unit.unit_rows(torch.arange(len(side), device=side.embeddings.device)))
    return (sides[0] @ sides[1].T.to(sides[0].device)).cpu()


def _within_cameras(camids: Tensor, rng: np.random.Generator) -> Places:
    """Return an order in which queries changed places with others of their camera.

    Where cameras have too few queries to change places, all do.
    """
    cameras = camids.cpu().numpy()
    order = np.arange(len(cameras))
    sizes = np.unique(cameras, return_counts=True)[1]
    groups = [np.flatnonzero(cameras == c) for c in np.unique(cameras)]
    if sizes.min() < 4:
        groups = [order.copy()]
    for group in groups:
        order[group] = rng.permutation(group)
    return order
