"""Linking stored images without network and key: by the print that repeated noise leaves."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from engine.attacks.base import CipherAttack, Outcome, percent
from engine.attacks.context import AttackContext
from engine.attacks.files import file_size
from engine.attacks.filters import high_pass
from engine.attacks.levels import CLEAR_LEVELS, Stored
from engine.attacks.links import link_measures
from engine.attacks.statistics import share_measure


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
