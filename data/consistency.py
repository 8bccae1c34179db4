"""Checks across the subsets of a data set, before anything is trained or scored.

Queries need matches in the gallery. Training and test must not share identities or images, and a
query must not be a copy of a gallery image: each of these makes scores too good or impossible.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data import problems as wrong
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample
from utils.logger import Progress, get_logger


@dataclass(frozen=True)
class PositiveCounts:
    """Matches per query."""

    counts: tuple[int, ...]  # number of matches of each query, in the order of the queries
    without: tuple[Sample, ...]  # queries without a match; scores leave them out


def count_positives(
    query: Sequence[Sample], gallery: Sequence[Sample], *, cross_camera: bool
) -> PositiveCounts:
    """Count the gallery images of each query's identity, of other cameras if ``cross_camera``."""
    of_person = Counter(s.pid for s in gallery)
    of_person_and_camera = Counter((s.pid, s.camid) for s in gallery)
    counts = tuple(
        of_person[s.pid] - (of_person_and_camera[s.pid, s.camid] if cross_camera else 0)
        for s in query
    )
    return PositiveCounts(counts, tuple(s for s, n in zip(query, counts, strict=True) if n == 0))


def positive_problems(
    query: Sequence[Sample], gallery: Sequence[Sample], *, cross_camera: bool, title: str = "test"
) -> tuple[Problem, ...]:
    """Check that queries can be scored against a gallery.

    Returns:
        A warning if some queries have no match, with examples.

    Raises:
        DatasetError: There are no queries or no gallery images, all images are from one camera, or
            no query has a match.
    """
    if not query or not gallery:
        raise DatasetError(
            "no-test-set",
            f"the {title} set has {len(query)} queries and {len(gallery)} gallery images; it needs "
            "both",
        )
    if cross_camera and len({s.camid for s in (*query, *gallery)}) == 1:
        raise wrong.single_camera(title)
    without = count_positives(query, gallery, cross_camera=cross_camera).without
    if not without:
        return ()
    where = "in another camera of the gallery" if cross_camera else "in the gallery"
    named = wrong.examples([s.path for s in without], 5)
    if len(without) == len(query):
        raise DatasetError(
            "no-matches",
            f"none of the {len(query)} {title} queries has a match {where} ({named}); check that "
            "query and gallery belong together and use the same numbers for the same persons",
        )
    text = (
        f"{len(without)} of the {len(query)} {title} queries have no match {where} and are left "
        f"out of the scores: {named}"
    )
    return (Problem("queries-without-match", text),)


def check_positives(
    query: Sequence[Sample], gallery: Sequence[Sample], *, cross_camera: bool, title: str = "test"
) -> tuple[Problem, ...]:
    """Do the same as :func:`positive_problems`, and log the warnings."""
    problems = positive_problems(query, gallery, cross_camera=cross_camera, title=title)
    for problem in problems:
        get_logger().warning(problem.text)
    return problems


def identity_problems(splits: DatasetSplits) -> tuple[Problem, ...]:
    """Return warnings for identities that are both in training and in test or validation.

    Scores, attacks and thresholds are defined for people whom no network was trained on. MSMT17
    numbers test persons from 0 again; do not call this for data sets in which that happens.
    """
    trained = {sample.pid for sample in splits.train}
    problems = []
    for title, samples in (
        ("test", (*splits.query, *splits.gallery)),
        ("validation", (*splits.val_query, *splits.val_gallery)),
    ):
        both = sorted(trained & {sample.pid for sample in samples})
        if both:
            text = (
                f"{len(both)} persons are both in the training and in the {title} set (pid "
                f"{wrong.examples([str(pid) for pid in both], 5)}): networks were trained on "
                "them, so scores and attacks look better than for other people; keep each person "
                "in one of the sets, or use different numbers for different people"
            )
            problems.append(Problem("persons-not-strangers", text))
    return tuple(problems)


def copy_problems(splits: DatasetSplits) -> tuple[Problem, ...]:
    """Return warnings for images whose content is in two subsets that must not share any.

    Compared are queries with gallery images, and training images with test and validation images.
    Files of equal size are compared by their hash.
    """
    test = (*splits.query, *splits.gallery)
    validation = (*splits.val_query, *splits.val_gallery)
    pairs = (
        ("queries", splits.query, "gallery images", splits.gallery),
        ("validation queries", splits.val_query, "validation gallery images", splits.val_gallery),
        ("test images", test, "training images", splits.train),
        ("validation images", validation, "training images", splits.train),
    )
    hashes = _hashes([(left, right) for _, left, _, right in pairs])
    problems = []
    for left_title, left, right_title, right in pairs:
        originals = {hashes[s.path]: s.path for s in reversed(right) if s.path in hashes}
        copies = [s.path for s in left if hashes.get(s.path) in originals]
        if copies:
            example = f"{copies[0]} and {originals[hashes[copies[0]]]}"
            effect = (
                "they find themselves at rank 1"
                if "queries" in left_title
                else "networks were trained on them"
            )
            text = (
                f"{len(copies)} of {len(left)} {left_title} are copies of {right_title} (for "
                f"example {example}): {effect}, so scores are too good; remove the copies"
            )
            problems.append(Problem("copies", text))
    return tuple(problems)


def _hashes(pairs: Sequence[tuple[Sequence[Sample], Sequence[Sample]]]) -> dict[str, bytes]:
    """Return the hash of each file that may have a copy on the other side, by path."""
    sizes: dict[str, int] = {}
    for sample in (s for pair in pairs for side in pair for s in side):
        if sample.path not in sizes:
            sizes[sample.path] = _size(sample.path)
    candidates: set[str] = set()
    for left, right in pairs:
        sides: list[dict[int, list[str]]] = [defaultdict(list), defaultdict(list)]
        for by_size, side in zip(sides, (left, right), strict=True):
            for sample in side:
                by_size[sizes[sample.path]].append(sample.path)
        for size in (sides[0].keys() & sides[1].keys()) - {0}:
            candidates.update(sides[0][size], sides[1][size])
    paths = sorted(candidates)
    hashes: dict[str, bytes] = {}
    with ThreadPoolExecutor() as pool, Progress(len(paths), "comparing images") as progress:
        for path, digest in zip(paths, pool.map(_hash, paths), strict=True):
            if digest is not None:
                hashes[path] = digest
            progress.update(1)
    return hashes


def _size(path: str) -> int:
    """Return the size of a file; 0 if it cannot be read, which is reported when it is decoded."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _hash(path: str) -> bytes | None:
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
    except OSError:
        return None


def notes_of(problems: Iterable[Problem]) -> dict[str, str]:
    """Return the notes that a report must contain because of problems of the data."""
    copies = [problem.text.partition(" (for example")[0] for problem in problems
              if problem.code == "copies"]  # fmt: skip
    return {"copies": "; ".join(copies)} if copies else {}
