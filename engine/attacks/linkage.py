"""How well stored images of one person find each other, and how far luck alone would carry.

The floor is measured as ``engine.attacks.measures`` says: on queries that were dealt anew.

Linking stored images without network and key: by the print that repeated noise leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.attacks.attack import CipherAttack, Outcome, percent
from engine.attacks.averaging import high_pass
from engine.attacks.context import AttackContext
from engine.attacks.levels import CLEAR_LEVELS, Stored, file_size
from engine.attacks.measures import (
    Floats,
    Measure,
    Places,
    deal_interval,
    interval_of,
    share_measure,
)
from engine.scoring.features import Features, UnitFeatures
from utils.errors import UserError
from utils.seeding import numpy_generator

_RETRIEVAL_DEALS = 100
_FEWEST_PERSONS = 4  # under one camera, so that its queries are dealt among themselves


def link_measures(
    query: Features,
    gallery: Features,
    seed: int,
    *,
    cross_camera: bool,
    similarity: Tensor | None = None,
    prefix: str = "",
    names: Sequence[str] = ("rank1", "mAP"),
) -> tuple[Measure, ...]:
    """Score how well queries find images of their person, beside the same queries dealt anew.

    The floor is the score of queries that changed places with others of their camera: what a
    network makes of cameras and favourite gallery images stays, the persons go. A query that moved
    still does not look at images of its own person and camera: nearly its doubles, they would push
    every answer down, and the floor below what luck reaches.

    Args:
        query: What is looked with.
        gallery: What is looked through.
        seed: Of resampling and dealing.
        cross_camera: Whether gallery images of a query's own camera are ignored.
        similarity: Of each query and gallery image (Q, G); left out: the cosine of their
            embeddings, which otherwise are not read.
        prefix: Put before the names of the measures.
        names: Which scores of ``PairRules.scores``.

    Returns:
        A measure for each name; all decide.
    """
    alike = cosines(query, gallery) if similarity is None else similarity
    matching = PairRules.of(query, gallery, cross_camera=cross_camera)
    pids = query.pids.cpu()[matching.scored]

    def scores(order: Places) -> dict[str, Floats]:
        found = matching.scores(alike, torch.from_numpy(order))
        return {name: found[name] for name in names}

    own = scores(np.arange(len(query)))
    rng = numpy_generator(seed, "deals of queries")
    deals = [scores(_within_cameras(query, rng)) for _ in range(_RETRIEVAL_DEALS)]
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
        ignored: Gallery images of the query's person and camera, bool (Q, G), for each query.
        scored: Places of the queries that have a match (S,).
    """

    matches: Tensor
    ignored: Tensor
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
        return cls(matches[scored], ignored, scored)

    def scores(self, similarity: Tensor, order: Tensor | None = None) -> dict[str, Floats]:
        """Score similarities of all queries and gallery images (Q, G).

        Args:
            similarity: Of every query and gallery image.
            order: Which query's image stands in each query's place (Q,); left out: its own. It
                brings along what it does not look at, besides what its place does not look at.

        Returns:
            ``rank1``, ``mAP`` and ``auc`` of each scored query (S,); the last is the chance that a
            match is closer than an image of somebody else. Ties go to the earlier gallery image.
        """
        shown = self.scored if order is None else order[self.scored]
        hidden = self.ignored[self.scored] | (self.ignored[shown] & ~self.matches)
        rows = similarity[shown].masked_fill(hidden, -torch.inf)
        ranking = rows.argsort(dim=1, descending=True, stable=True)
        hits = self.matches.gather(1, ranking).double()
        found, rank = hits.cumsum(1), torch.arange(1, hits.shape[1] + 1)
        number = hits.sum(1)
        others = ((~hidden).sum(1) - number).clamp_min(1)
        before = ((rank - found) * hits).sum(1)  # others ahead of each match
        values = {
            "rank1": hits[:, 0],
            "mAP": (hits * found / rank).sum(1) / number,
            "auc": 1 - before / number / others,
        }
        return {name: value.numpy() for name, value in values.items()}


def cosines(query: Features, gallery: Features) -> Tensor:
    """Return the cosine of every query and gallery image, float32 (Q, G) on the CPU.

    A broken row (NaN, infinite, zero) has cosine 0 to all.
    """
    sides = []
    for side in (query, gallery):
        unit = UnitFeatures.of(side)
        sides.append(unit.unit_rows(torch.arange(len(side), device=side.embeddings.device)))
    return (sides[0] @ sides[1].T.to(sides[0].device)).cpu()


def _within_cameras(query: Features, rng: np.random.Generator) -> Places:
    """Return an order in which queries changed places with others of their camera.

    Where a camera saw too few persons to deal among, all change places: many queries of one person
    would only change places with each other, and the floor would be the score itself.
    """
    cameras, people = query.camids.cpu().numpy(), query.pids.cpu().numpy()
    order = np.arange(len(cameras))
    groups = [np.flatnonzero(cameras == camera) for camera in np.unique(cameras)]
    if min(len(np.unique(people[group])) for group in groups) < _FEWEST_PERSONS:
        groups = [order.copy()]
    for group in groups:
        order[group] = rng.permutation(group)
    return order


class NoisePrintLinkage:
    """High-pass and normalised correlation: a pad that one person's images share is a fingerprint.

    On levels without encryption there is no noise of a person to find; edges of clothes may still
    resemble each other, and the measure shows how far that carries.
    """

    name: ClassVar[str] = "linkage"
    question: ClassVar[str] = "Do two stored images of one person share a print of noise?"

    def reason_against(self, level: str) -> str:  # noqa: ARG002
        """See ``Attack``."""
        return ""

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        prints = noise_print(context.stored(level).observed)
        measures = link_measures(
            *context.sides(prints, prints),
            context.seed,
            cross_camera=context.cross_camera,
            names=("rank1", "auc"),
        )
        sentence = (
            "Without key and network, by correlating fine noise alone, the same person comes first "
            f"in {percent(measures[0])} of searches; a pair of one person correlates more than a "
            f"pair of two in {percent(measures[1])}."
        )
        if level in CLEAR_LEVELS:
            sentence += (
                " No noise is added at this level: what goes beyond chance are outlines in the "
                "picture itself."
            )
        values = {"measures": measures, "budget": 0, "budget_unit": "no training"}
        return Outcome(context.result(self.name, level, sentence, **values))


class MetadataLinkage(CipherAttack):
    """What stands beside the pixels: public headers and file sizes.

    Headers are compared byte by byte, and searched for the person's label.
    """

    name: ClassVar[str] = "metadata"
    question: ClassVar[str] = "Do header and size of a file say who is on it?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        stored = context.stored(level)
        headers, sizes = public_bytes(stored)
        mask = context.private.is_query
        query, gallery = context.sides(headers, headers)
        agreement = (headers[mask][:, None] == headers[~mask][None]).float().mean(-1)
        agreement += (sizes[mask][:, None] == sizes[~mask][None]).float()
        measures = link_measures(
            query, gallery, context.seed, similarity=agreement,
            cross_camera=context.cross_camera, names=("rank1", "auc"),
        )  # fmt: skip
        assert stored.sealed is not None
        named = [
            subject.encode() in header
            for subject, header in zip(context.private.subjects, stored.sealed.headers, strict=True)
        ]
        told = share_measure("named", named, context.private.pids, context.seed)
        sentence = (
            f"The public part of a file names the person in {100 * told.value.value:.0f} % of "
            f"cases, and links two of one person in {percent(measures[0])} of searches; files have "
            f"{len(torch.unique(sizes))} different sizes."
        )
        values = {
            "measures": (told, *measures),
            "budget": 0,
            "budget_unit": "no training",
            "details": {"file_sizes": len(torch.unique(sizes)), "header_bytes": headers.shape[1]},
        }
        return Outcome(context.result(self.name, level, sentence, **values))


def noise_print(images: Tensor) -> Tensor:
    """Return the fine noise of images as zero-mean vectors (N, D)."""
    prints = torch.cat([high_pass(part).flatten(1) for part in images.split(64)])
    return prints - prints.mean(1, keepdim=True)


def public_bytes(stored: Stored) -> tuple[Tensor, Tensor]:
    """Return what is public beside the pixels: header bytes (N, L), and sizes of files (N,)."""
    assert stored.sealed is not None
    headers = stored.sealed.headers
    longest = max(1, *map(len, headers))  # headers may be empty, and are then all the same
    table = torch.tensor([list(header.ljust(longest, b"\0")) for header in headers])
    sizes = [file_size(stored.sealed.at(place)) for place in range(len(headers))]
    return table.float(), torch.tensor(sizes)
