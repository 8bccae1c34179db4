"""Dividing identities: a validation set out of a training set, and persons into three parts.

Pure functions of samples and a seed; nothing here touches a file.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.problems import DatasetError
from data.records import Sample

DEFAULT_FRACTION = 0.2

NameOf = Callable[[Sample], str]


def base_name(sample: Sample) -> str:
    """File name of a sample without its folder."""
    return Path(sample.path).name


@dataclass(frozen=True)
class ValidationSplit:
    """A training set divided.

    Attributes:
        train: What is left to train on.
        val_query: Queries of the validation.
        val_gallery: Gallery of the validation.
    """

    train: tuple[Sample, ...]
    val_query: tuple[Sample, ...]
    val_gallery: tuple[Sample, ...]


def split_by_identity(
    samples: Sequence[Sample],
    seed: int,
    fraction: float = DEFAULT_FRACTION,
    name_of: NameOf = base_name,
) -> ValidationSplit:
    """Move a share of the identities into validation; no identity is on both sides.

    Only identities seen by two cameras or more are drawn, so that a query can have a match. Of the
    validation images, at most ``fraction`` become queries: one per identity and camera at most,
    every identity getting one before any gets a second, and each keeping a match in another camera.

    Args:
        samples: The whole training set.
        seed: The same seed and samples give the same split, whatever the order of the samples.
        fraction: Share of the identities, and of their images at most to become queries.
        name_of: Name by which samples are ordered before anything is drawn.

    Raises:
        DatasetError: There are not at least two identities, or none is seen by two cameras.
    """
    by_pid = _by_pid(samples, name_of)
    eligible = [pid for pid, images in by_pid.items() if _can_be_queried(images)]
    wanted = max(1, round(fraction * len(by_pid)))
    if len(by_pid) < 2 or not eligible:
        raise DatasetError(
            "too-few-identities",
            f"no validation split can be made of {len(by_pid)} identities of which {len(eligible)} "
            "are seen by two cameras; it needs two identities, and one of them in two cameras",
        )
    generator = random.Random(seed)  # noqa: S311 - a division of a data set is no secret
    chosen = set(generator.sample(eligible, min(wanted, len(eligible), len(by_pid) - 1)))
    held_out = [s for pid in sorted(chosen) for s in by_pid[pid]]
    budget = max(1, int(fraction * len(held_out)))
    queries = set(_draw_queries([by_pid[pid] for pid in sorted(chosen)], budget, generator))
    return ValidationSplit(
        train=tuple(s for s in _ordered(samples, name_of) if s.pid not in chosen),
        val_query=tuple(s for s in _ordered(held_out, name_of) if s in queries),
        val_gallery=tuple(s for s in _ordered(held_out, name_of) if s not in queries),
    )


def split_as_published(
    samples: Sequence[Sample],
    seed: int,
    fraction: float = DEFAULT_FRACTION,
    name_of: NameOf = base_name,
) -> ValidationSplit:
    """Divide by the published rule: the first share of the sorted files, of those a drawn share.

    The last identity of the validation may also be in training, and a query may have no match:
    scores then leave it out. For comparison with published numbers only. Arguments as above.

    Raises:
        DatasetError: There are too few images.
    """
    ordered = _ordered(samples, name_of)
    held_out = ordered[: int(fraction * len(ordered))]
    generator = random.Random(seed)  # noqa: S311 - as above
    queries = set(generator.sample(held_out, int(fraction * len(held_out))))
    if not queries or len(held_out) == len(ordered):
        raise DatasetError(
            "too-few-images",
            f"{len(ordered)} images are too few for the published split; it needs 25",
        )
    return ValidationSplit(
        train=tuple(ordered[len(held_out) :]),
        val_query=tuple(s for s in held_out if s in queries),
        val_gallery=tuple(s for s in held_out if s not in queries),
    )


STRATEGIES = {"identity": split_by_identity, "published": split_as_published}


def divide_persons(samples: Sequence[Sample], seed: int = 1) -> dict[str, tuple[Sample, ...]]:
    """Divide a set that came without subsets: 3 of 5 persons train, 1 validation, 1 test.

    Persons without two pictures to compare train; where few others are left, half of those validate
    and half test. One picture per person and camera becomes a query, as long as the person keeps
    another picture (in another camera, where the set has more than one).

    Raises:
        DatasetError: There are fewer than 3 persons with two pictures.
    """
    by_pid = _by_pid(samples)
    several_cameras = len({s.camid for s in samples}) > 1
    usable = [
        pid
        for pid, images in by_pid.items()
        if (_can_be_queried(images) if several_cameras else len(images) > 1)
    ]
    if len(usable) < 3:
        raise DatasetError(
            "too-few-identities",
            f"{len(usable)} of {len(by_pid)} persons have two pictures"
            f"{' in different cameras' if several_cameras else ''}; three are needed to divide "
            "them into training, validation and test",
        )
    generator = random.Random(seed)  # noqa: S311 - as above
    generator.shuffle(usable)
    # Where few can be queried, validation and test share them: neither is ever empty.
    share = max(1, min(len(by_pid) // 5, len(usable) // 2))
    test, validation = set(usable[:share]), set(usable[share : 2 * share])
    parts = {"train": tuple(s for s in _ordered(samples) if s.pid not in test | validation)}
    for chosen, names, split in (
        (validation, ("val_query", "val_gallery"), "train"),
        (test, ("query", "gallery"), "test"),
    ):
        images = [by_pid[pid] for pid in sorted(chosen)]
        queries = set(_draw_queries(images, len(samples), generator, cross_camera=several_cameras))
        held_out = _ordered([s for group in images for s in group])
        parts[names[0]] = _relabel([s for s in held_out if s in queries], split)
        parts[names[1]] = _relabel([s for s in held_out if s not in queries], split)
    parts["train"] = _relabel(parts["train"], "train")
    return parts


def _relabel(samples: Sequence[Sample], split: str) -> tuple[Sample, ...]:
    return tuple(
        replace(s, subject=f"{s.subject.rsplit('/', 2)[0]}/{split}/{s.pid}") for s in samples
    )


def _ordered(samples: Sequence[Sample], name_of: NameOf = base_name) -> list[Sample]:
    return sorted(samples, key=lambda s: (name_of(s), s.path))


def _by_pid(samples: Sequence[Sample], name_of: NameOf = base_name) -> dict[int, list[Sample]]:
    """Samples of each identity, everything in an order that no file system decides."""
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in _ordered(samples, name_of):
        groups[sample.pid].append(sample)
    return dict(sorted(groups.items()))


def _can_be_queried(images: Sequence[Sample]) -> bool:
    return len({s.camid for s in images}) > 1


def _draw_queries(
    persons: Sequence[Sequence[Sample]],
    budget: int,
    generator: random.Random,
    *,
    cross_camera: bool = True,
) -> list[Sample]:
    """Draw up to ``budget`` queries, going round the persons and giving each one camera a turn."""
    turns = [_candidates(images, generator) for images in persons]
    left = [Counter(s.camid for s in images) for images in persons]
    asked: list[list[int]] = [[] for _ in persons]
    queries: list[Sample] = []
    while any(turns):
        order = [i for i, turn in enumerate(turns) if turn]
        # When the budget ends within a round, chance decides who is left out.
        generator.shuffle(order)
        for i in order:
            candidate = turns[i].pop()
            if len(queries) < budget and _keeps_match(
                left[i], asked[i], candidate.camid, cross_camera
            ):
                left[i][candidate.camid] -= 1
                asked[i].append(candidate.camid)
                queries.append(candidate)
    return queries


def _candidates(images: Sequence[Sample], generator: random.Random) -> list[Sample]:
    """One picture of each camera, in a drawn order."""
    by_camera: dict[int, list[Sample]] = defaultdict(list)
    for sample in images:
        by_camera[sample.camid].append(sample)
    drawn = [generator.choice(by_camera[camid]) for camid in sorted(by_camera)]
    generator.shuffle(drawn)
    return drawn


def _keeps_match(left: Counter[int], asked: list[int], camid: int, cross_camera: bool) -> bool:
    """Whether every query of a person, and this one, would still find a match in the gallery."""
    after = left - Counter([camid])
    total = after.total()
    return all(total - (after[camera] if cross_camera else 0) > 0 for camera in [*asked, camid])
