"""Whom an attacker knows and whom he is after: images of public and of private persons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.records import Sample
from utils.errors import UserError
from utils.seeding import numpy_generator

MINIMUM_PERSONS = 6
_VALIDATION_SHARE = 6  # one public person in so many is held out
_VALIDATION_IMAGES = (64, 512)  # least and most of them that are looked at
_IMAGES_EACH = 8  # of a held-out person: attacks on several images of one need some


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images of some persons, as decoded: 8-bit, on the CPU.

    Attributes:
        raw, desensitized: uint8 (N, 3, H, W).
        pids, camids: int64 (N,).
        subjects: Label that each image's owner encrypts it under.
        is_query: Whether an image is looked with (or else for), bool (N,).
    """

    raw: Tensor
    desensitized: Tensor
    pids: Tensor
    camids: Tensor
    subjects: tuple[str, ...]
    is_query: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.raw)

    @property
    def num_persons(self) -> int:
        """Number of distinct persons."""
        return len(torch.unique(self.pids))

    def take(self, index: Tensor) -> ImageSet:
        """Return some of the images, by place (or by a mask)."""
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        return ImageSet(
            self.raw[index],
            self.desensitized[index],
            self.pids[index],
            self.camids[index],
            tuple(self.subjects[place] for place in index.tolist()),
            self.is_query[index],
        )


@dataclass(frozen=True)
class Cast:
    """Samples of the persons of an attack.

    Attributes:
        public: What attackers train on, in an order drawn once: a smaller budget is a prefix.
        validation: Held-out public persons, by which an attacker chooses what he keeps.
        private: Query and gallery images of the persons that attacks are scored on.
        is_query: Whether each private sample is a query.
    """

    public: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    private: tuple[Sample, ...]
    is_query: tuple[bool, ...]


def choose_people(
    train: Sequence[Sample],
    query: Sequence[Sample],
    gallery: Sequence[Sample],
    *,
    budget: int,
    people: int,
    seed: int,
) -> Cast:
    """Deal persons to the roles of an attack.

    Public persons are the training identities, private ones those that are both in query and
    gallery; distractors take no part.

    Args:
        train: Training samples of the data set.
        query: Its test queries.
        gallery: Its test gallery.
        budget: Most public images that an attacker trains on.
        people: Most private persons.
        seed: Of the deal.

    Raises:
        UserError: There are too few persons or images.
    """
    rng = numpy_generator(seed, "attack people")
    known = [int(pid) for pid in rng.permutation(sorted({s.pid for s in train}))]
    held_out = set(known[: max(2, len(known) // _VALIDATION_SHARE)])
    _check_count("public", len(known), "training identities")
    order = rng.permutation(len(train))
    shuffled = [train[place] for place in order]
    public = [s for s in shuffled if s.pid not in held_out]
    of_person = {pid: [s for s in shuffled if s.pid == pid] for pid in known if pid in held_out}
    validation = [s for images in of_person.values() for s in images[:_IMAGES_EACH]]
    if budget > len(public):
        raise UserError(
            f"--budget is {budget}, but the public persons have {len(public)} images to train on, "
            f"besides those held out; expected at most {len(public)}"
        )
    least, most = _VALIDATION_IMAGES
    both = sorted({s.pid for s in query} & {s.pid for s in gallery})
    _check_count("private", len(both), "test identities with query and gallery images")
    chosen = {int(pid) for pid in rng.permutation(both)[:people]}
    sides = [(s, True) for s in query] + [(s, False) for s in gallery]
    kept = [(s, is_query) for s, is_query in sides if s.pid in chosen]
    return Cast(
        public=tuple(public[:budget]),
        validation=tuple(validation[: min(max(budget // 2, least), most)]),
        private=tuple(s for s, _ in kept),
        is_query=tuple(is_query for _, is_query in kept),
    )


def _check_count(which: str, found: int, what: str) -> None:
    if found < MINIMUM_PERSONS:
        raise UserError(
            f"the data set has {found} {which} persons ({what}); expected at least "
            f"{MINIMUM_PERSONS}: an interval over fewer says nothing"
        )
