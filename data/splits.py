"""Divide samples: a validation set from a training set, or persons into three subsets.

Pure functions of samples and a seed; no files are read or written.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data.problems import DatasetError
from data.records import Sample

DEFAULT_FRACTION = 0.2

NameOf = Callable[[Sample], str]


def base_name(sample: Sample) -> str:
    """Return the file name of a sample."""
    return Path(sample.path).name


# Samples by subset, such as ``train`` and ``val_query``.
Parts = dict[str, tuple[Sample, ...]]


def split_by_identity(
    samples: Sequence[Sample],
    seed: int,
    fraction: float = DEFAULT_FRACTION,
    name_of: NameOf = base_name,
) -> Parts:
    """Move a fraction of the identities to validation; no identity is in both subsets.

    Only identities with images from two cameras are drawn, so that queries can have matches; two
    images are enough if all samples are from one camera. At most ``fraction`` of the validation
    images become queries: at most one per identity and camera, one for every identity before a
    second for any, and each with a match (in another camera, if there are several).

    The same seed and samples, in any order, give the same split: they are sorted by ``name_of``
    before drawing.

    Raises:
        DatasetError: There are fewer than two identities, or none has two such images.
    """
    by_pid = _by_pid(samples, name_of)
    several = several_cameras(samples)
    eligible = _queryable(by_pid, cross_camera=several)
    wanted = max(1, round(fraction * len(by_pid)))
    if len(by_pid) < 2 or not eligible:
        images = "images from two cameras" if several else "two images"
        raise DatasetError(
            "too-few-identities",
            f"{len(by_pid)} identities, {len(eligible)} of them with {images}, are too few for a "
            f"validation split; it needs two, and one of them with {images}",
        )
    generator = random.Random(seed)  # noqa: S311 - a split is not a secret
    chosen = set(generator.sample(eligible, min(wanted, len(eligible), len(by_pid) - 1)))
    held_out = [s for pid in sorted(chosen) for s in by_pid[pid]]
    budget = max(1, int(fraction * len(held_out)))
    persons = [by_pid[pid] for pid in sorted(chosen)]
    queries = set(_draw_queries(persons, budget, generator, cross_camera=several))
    train = tuple(s for s in _ordered(samples, name_of) if s.pid not in chosen)
    return {"train": train} | _divided(_ordered(held_out, name_of), queries)


def split_as_published(
    samples: Sequence[Sample],
    seed: int,
    fraction: float = DEFAULT_FRACTION,
    name_of: NameOf = base_name,
) -> Parts:
    """Divide by the published rule: the first ``fraction`` of the sorted files, for validation.

    A drawn ``fraction`` of these become queries. The last validation identity may also be in
    training, and queries may have no match; scores leave those out. Use it only to reproduce
    published numbers. The arguments are those of :func:`split_by_identity`.

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
    return {"train": tuple(ordered[len(held_out) :])} | _divided(held_out, queries)


STRATEGIES = {"identity": split_by_identity, "published": split_as_published}


def _divided(held_out: Sequence[Sample], queries: set[Sample], prefix: str = "val_") -> Parts:
    """Return the images that are queries, and the others as their gallery."""
    return {
        f"{prefix}query": tuple(s for s in held_out if s in queries),
        f"{prefix}gallery": tuple(s for s in held_out if s not in queries),
    }


def divide_persons(samples: Sequence[Sample], seed: int = 1) -> Parts:
    """Divide persons into training, validation and test, 3 : 1 : 1.

    Persons without two images to compare are in training. If few others remain, half of them are in
    validation and half in test. One image per person and camera becomes a query, if the person
    keeps another image (from another camera, if the set has several).

    Raises:
        DatasetError: Fewer than 3 persons have two images.
    """
    by_pid = _by_pid(samples)
    several = several_cameras(samples)
    usable = _queryable(by_pid, cross_camera=several)
    if len(usable) < 3:
        raise DatasetError(
            "too-few-identities",
            f"{len(usable)} of {len(by_pid)} persons have two images"
            f"{' from different cameras' if several else ''}; three are needed to divide "
            "them into training, validation and test",
        )
    generator = random.Random(seed)  # noqa: S311 - as above
    generator.shuffle(usable)
    # If few persons can be queried, validation and test get half of them each.
    share = max(1, min(len(by_pid) // 5, len(usable) // 2))
    test, validation = set(usable[:share]), set(usable[share : 2 * share])
    train = tuple(s for s in _ordered(samples) if s.pid not in test | validation)
    parts = {"train": _relabelled(train, "train")}
    for chosen, prefix, split in ((validation, "val_", "train"), (test, "", "test")):
        images = [by_pid[pid] for pid in sorted(chosen)]
        queries = set(_draw_queries(images, len(samples), generator, cross_camera=several))
        held_out = _ordered([s for group in images for s in group])
        for subset, part in _divided(held_out, queries, prefix).items():
            parts[subset] = _relabelled(part, split)
    return parts


def _relabelled(samples: Sequence[Sample], split: str) -> tuple[Sample, ...]:
    return tuple(
        replace(s, subject=f"{s.subject.rsplit('/', 2)[0]}/{split}/{s.pid}") for s in samples
    )


def _ordered(samples: Sequence[Sample], name_of: NameOf = base_name) -> list[Sample]:
    return sorted(samples, key=lambda s: (name_of(s), s.path))


def _by_pid(samples: Sequence[Sample], name_of: NameOf = base_name) -> dict[int, list[Sample]]:
    """Return the samples of each identity, sorted by name, not in the order of the file system."""
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in _ordered(samples, name_of):
        groups[sample.pid].append(sample)
    return dict(sorted(groups.items()))


def several_cameras(samples: Iterable[Sample]) -> bool:
    """Return whether the samples are from more than one camera."""
    return len({s.camid for s in samples}) > 1


def _queryable(by_pid: Mapping[int, Sequence[Sample]], *, cross_camera: bool) -> list[int]:
    """Return the identities of which one image can be a query of another one."""
    return [
        pid
        for pid, images in by_pid.items()
        if (several_cameras(images) if cross_camera else len(images) > 1)
    ]


def _draw_queries(
    persons: Sequence[Sequence[Sample]],
    budget: int,
    generator: random.Random,
    *,
    cross_camera: bool,
) -> list[Sample]:
    """Draw up to ``budget`` queries in rounds; each person gets at most one query per round."""
    turns = [_candidates(images, generator) for images in persons]
    left = [Counter(s.camid for s in images) for images in persons]
    asked: list[list[int]] = [[] for _ in persons]
    queries: list[Sample] = []
    while any(turns):
        order = [i for i, turn in enumerate(turns) if turn]
        # If the budget ends within a round, the remaining persons are random.
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
    """Draw one image of each camera, in random order."""
    by_camera: dict[int, list[Sample]] = defaultdict(list)
    for sample in images:
        by_camera[sample.camid].append(sample)
    drawn = [generator.choice(by_camera[camid]) for camid in sorted(by_camera)]
    generator.shuffle(drawn)
    return drawn


def _keeps_match(left: Counter[int], asked: list[int], camid: int, cross_camera: bool) -> bool:
    """Return whether all queries of a person, and a new one, keep a match in the gallery."""
    after = left - Counter([camid])
    total = after.total()
    return all(total - (after[camera] if cross_camera else 0) > 0 for camera in [*asked, camid])
