"""Linking stored images of one identity: scores with floors, and attacks without a network.

``link_measures`` scores how well stored images of one identity find each other; its floor comes
from permuted queries (see ``engine.attacks.measures``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attacks.attack import UNTRAINED, Attack, AttackContext, CipherAttack, Outcome, percent
from engine.attacks.key_reuse import high_pass
from engine.attacks.levels import CLEAR_LEVELS, Stored, file_size
from engine.attacks.measures import (
    Floats,
    Indices,
    Measure,
    interval_of,
    permutation_interval,
    permute_identities,
    share_measure,
)
from engine.scoring.features import Features, UnitFeatures
from utils.errors import UserError
from utils.logger import Progress
from utils.seeding import numpy_generator

_RETRIEVAL_PERMUTATIONS = 100
_MIN_IDENTITIES_PER_CAMERA = 4  # so that the queries of a camera are permuted


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
    """Score how well queries find images of their identity, with a permutation floor.

    The floor is the score of queries exchanged with others of the same camera (see
    ``_exchange_within_cameras``). This keeps camera and hubness effects and removes identity. An
    exchanged query still ignores gallery images of its own identity and camera: these
    near-duplicates would take the first ranks, and the floor would be lower than chance.

    Returns a deciding measure, named with ``prefix``, for each of the scores ``names`` of
    ``PairRules.scores``. Without ``similarity`` (Q, G), it is the cosine of the embeddings.
    """
    similarities = cosines(query, gallery) if similarity is None else similarity
    matching = PairRules.of(query, gallery, cross_camera=cross_camera)
    pids = query.pids.cpu()[matching.scored]

    def scores(order: Indices) -> dict[str, Floats]:
        values = matching.scores(similarities, torch.from_numpy(order))
        return {name: values[name] for name in names}

    own = scores(np.arange(len(query)))
    rng = numpy_generator(seed, "deals of queries")  # the name is part of the seed
    permuted = [
        scores(_exchange_within_cameras(query, rng))
        for _ in Progress.over(range(_RETRIEVAL_PERMUTATIONS), "Permute identities", unit="draw")
    ]
    return tuple(
        Measure(
            f"{prefix}{name}",
            "rate",
            interval_of(values, pids, seed),
            permutation_interval([float(one[name].mean()) for one in permuted]),
            decides=True,
        )
        for name, values in own.items()
    )


def search_measures(
    context: AttackContext, stored: Tensor, raw: Tensor | None
) -> tuple[Measure, ...]:
    """Score searches with stored images: among each other, and in raw images if they are given.

    Both are embeddings of the private images (N, D). Measures in raw images begin with ``to_raw_``.
    """
    options: dict[str, Any] = {"seed": context.seed, "cross_camera": context.cross_camera}
    measures = link_measures(*context.sides(stored, stored), **options)
    if raw is not None:
        measures += link_measures(*context.sides(stored, raw), prefix="to_raw_", **options)
    return measures


def search_sentence(subject: str, measures: Mapping[str, Measure], level: str) -> str:
    """Return what a search among stored images finds, without a full stop."""
    stored = "ciphertexts" if level not in CLEAR_LEVELS else f"{level} images"
    return (
        f"{subject} ranks the same identity first among {stored} in "
        f"{percent(measures['rank1'])} of cases (mAP {percent(measures['mAP'])})"
    )


@dataclass(frozen=True, eq=False)
class PairRules:
    """The matching rules as dense tables, for many permutations of few images.

    ``engine.scoring`` avoids such tables because of their size. Here they are small, and many times
    faster.
    """

    matches: Tensor  # gallery images to find, bool (S, G), for each of the S scored queries
    ignored: Tensor  # gallery images of the query's identity and camera, bool (Q, G)
    scored: Tensor  # indices of the queries that have a match (S,)

    @classmethod
    def of(cls, query: Features, gallery: Features, *, cross_camera: bool) -> PairRules:
        """Return the tables by the rules of Market-1501; there is no junk.

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
                "no private query has a match at another camera; expected identities with images "
                "of two cameras, or TEST.CROSS_CAMERA False"
            )
        return cls(matches[scored], ignored, scored)

    def scores(self, similarity: Tensor, order: Tensor | None = None) -> dict[str, Floats]:
        """Return the scores of each scored query.

        Args:
            similarity: Similarities of all queries and gallery images (Q, G).
            order: Index of the query whose image replaces each query (Q,); None for no change. The
                gallery images that either of the two ignores are ignored.

        Returns:
            ``rank1``, ``mAP`` and ``auc``, each (S,). ``auc`` is the probability that a match is
            closer than an image of another identity. Ties go to the earlier gallery image.
        """
        shown = self.scored if order is None else order[self.scored]
        hidden = self.ignored[self.scored] | (self.ignored[shown] & ~self.matches)
        rows = similarity[shown].masked_fill(hidden, -torch.inf)
        ranking = rows.argsort(dim=1, descending=True, stable=True)
        hits = self.matches.gather(1, ranking).double()
        num_hits, rank = hits.cumsum(1), torch.arange(1, hits.shape[1] + 1)
        number = hits.sum(1)
        others = ((~hidden).sum(1) - number).clamp_min(1)
        before = ((rank - num_hits) * hits).sum(1)  # other identities ahead of each match
        values = {
            "rank1": hits[:, 0],
            "mAP": (hits * num_hits / rank).sum(1) / number,
            "auc": 1 - before / number / others,
        }
        return {name: value.numpy() for name, value in values.items()}


def cosines(query: Features, gallery: Features) -> Tensor:
    """Return the cosine of every query and gallery image, float32 (Q, G) on the CPU.

    A row of NaN, infinity or zeros has cosine 0 to all others.
    """
    sides = []
    for side in (query, gallery):
        unit = UnitFeatures.of(side)
        sides.append(unit.unit_rows(torch.arange(len(side), device=side.embeddings.device)))
    return (sides[0] @ sides[1].T.to(sides[0].device)).cpu()


def _exchange_within_cameras(query: Features, rng: np.random.Generator) -> Indices:
    """Return, for each query, a random query of the same camera.

    The queries of a camera are permuted. If it has few identities, most would be exchanged with
    queries of their own identity, and the floor would equal the score; so each gets a query of
    another identity. An identity alone at its camera keeps its queries: those of other cameras
    would look different to a network that knows cameras only. If each identity is alone, queries of
    all cameras are permuted.
    """
    cameras, identities = query.camids.cpu().numpy(), query.pids.cpu()
    order, is_exchanged = np.arange(len(cameras)), False
    for camera in np.unique(cameras):
        group = np.flatnonzero(cameras == camera)
        count = len(torch.unique(identities[group]))
        if count >= _MIN_IDENTITIES_PER_CAMERA:
            order[group] = rng.permutation(group)
        elif count > 1:
            order[group] = group[permute_identities(identities[group], 1, rng)[0]]
        is_exchanged |= count > 1
    return order if is_exchanged else rng.permutation(order)


class NoisePrintLinkage(Attack):
    """Correlates high-passed images: a pad that images of one identity share is a fingerprint.

    Without encryption there is no such pad; the score then comes from similar outlines.
    """

    name = "linkage"
    question = "Do stored images of one identity share a noise pattern?"

    def run(self, context: AttackContext, level: str) -> Outcome:
        """See ``Attack``."""
        observed = context.stored(level).observed
        prints = torch.cat([high_pass(part).flatten(1) for part in observed.split(64)])
        prints -= prints.mean(1, keepdim=True)
        measures = link_measures(
            *context.sides(prints, prints),
            context.seed,
            cross_camera=context.cross_camera,
            names=("rank1", "auc"),
        )
        sentence = (
            "Correlating fine noise, without key and network, ranks the same identity first in "
            f"{percent(measures[0])} of searches; a pair of one identity correlates more than a "
            f"pair of two in {percent(measures[1])}."
        )
        if level in CLEAR_LEVELS:
            sentence += (
                " No noise is added at this level: matches beyond chance come from outlines in the "
                "image."
            )
        return context.outcome(self, level, sentence, measures=measures, **UNTRAINED)


class MetadataLinkage(CipherAttack):
    """Compares public headers byte by byte, and file sizes; searches headers for the label."""

    name = "metadata"
    question = "Do header and size of a file reveal the identity?"

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
        labels = zip(context.private.subjects, stored.encrypted[1].headers, strict=True)
        named = [subject.encode() in header for subject, header in labels]
        named_share = share_measure("named", named, context.private.pids, context.seed)
        sentence = (
            f"The public part of a file names the identity in {100 * named_share.value.value:.0f} "
            f"% of cases, and links files of one identity in {percent(measures[0])} of searches; "
            f"files have {len(torch.unique(sizes))} different sizes."
        )
        details = {"file_sizes": len(torch.unique(sizes)), "header_bytes": headers.shape[1]}
        measures = (named_share, *measures)
        return context.outcome(
            self, level, sentence, measures=measures, details=details, **UNTRAINED
        )


def public_bytes(stored: Stored) -> tuple[Tensor, Tensor]:
    """Return header bytes (N, L) and file sizes (N,) of sealed images."""
    _, sealed = stored.encrypted
    headers = sealed.headers
    longest = max(1, *map(len, headers))  # empty headers are all equal
    table = torch.tensor([list(header.ljust(longest, b"\0")) for header in headers])
    sizes = [file_size(sealed.at(place)) for place in range(len(headers))]
    return table.float(), torch.tensor(sizes)
