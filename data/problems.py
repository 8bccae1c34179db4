"""Problems of data sets, and the checks across subsets before anything is trained or scored.

Each problem has a stable code and one sentence with the fix. The loaders, ``tools/data.py check``
and the start of a training report the same sentences, which therefore name the settings that a user
can change.

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
from typing import Literal

from data.images import IMAGE_SUFFIXES
from data.records import DatasetSplits, Sample
from utils.errors import UserError
from utils.logger import Progress, get_logger

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """One problem of a data set."""

    code: str  # short stable name, such as ``wrong-root``
    text: str  # what is wrong, what was expected, and what to do
    # ``error``: the data set cannot be used. ``warning``: it can, but results may be worse than
    # expected. ``note``: harmless.
    level: Level = "warning"


class DatasetError(UserError):
    """A data set that cannot be used; ``problem`` has the code and the text."""

    def __init__(self, code: str, text: str) -> None:
        self.problem = Problem(code, text, "error")
        super().__init__(text)

    def __reduce__(self) -> tuple[type[DatasetError], tuple[str, str]]:
        """Rebuild from both arguments, so that the error can be pickled."""
        return type(self), (self.problem.code, self.problem.text)


def examples(names: list[str], limit: int = 3) -> str:
    """Return the first names, separated by commas.

    >>> examples(["a", "b", "c"], 2)
    'a, b, ...'
    """
    shown = ", ".join(names[:limit])
    return f"{shown}, ..." if len(names) > limit else shown


def empty_folder(folder: Path, role: str) -> DatasetError:
    """Return the error for a folder without images."""
    suffixes = " ".join(IMAGE_SUFFIXES)
    return DatasetError(
        f"empty-{role}",
        f"{folder} contains no image ({suffixes}); expected the {role} images; copy them there, "
        "or unpack the archive again",
    )


def no_name_matches(folder: Path, names: list[str], pattern: str) -> DatasetError:
    """Return the error for a folder in which no file name matches a pattern."""
    return DatasetError(
        "no-name-matches",
        f"none of the {len(names)} images in {folder} is named {pattern} (for example "
        f"{examples(names)}); rename them, or describe them in a table: DATASETS.NAMES csv:FILE",
    )


def upper_case_suffixes(folder: Path, names: Iterable[str]) -> list[Problem]:
    """Return a note if images of a folder have suffixes such as ``.JPG``."""
    upper = [name for name in names if Path(name).suffix != Path(name).suffix.lower()]
    if not upper:
        return []
    text = (
        f"{len(upper)} images in {folder} have an upper-case suffix ({examples(upper)}); they "
        "are read here, but tools that look for *.jpg miss them: rename them to lower case"
    )
    return [Problem("upper-case-suffix", text, "note")]


def queries_without_match(
    query: Sequence[Sample], gallery: Sequence[Sample], *, cross_camera: bool
) -> list[Sample]:
    """Return the queries without a gallery image of their identity, which scores leave out.

    With ``cross_camera``, gallery images of the query's own camera do not count.
    """
    of_person = Counter(s.pid for s in gallery)
    of_person_and_camera = Counter((s.pid, s.camid) for s in gallery)
    return [
        s
        for s in query
        if of_person[s.pid] == (of_person_and_camera[s.pid, s.camid] if cross_camera else 0)
    ]


def positive_problems(
    query: Sequence[Sample], gallery: Sequence[Sample], *, cross_camera: bool, title: str = "test"
) -> tuple[Problem, ...]:
    """Check that queries can be scored against a gallery; return a warning if some have no match.

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
        raise DatasetError(
            "single-camera",
            f"all {title} images are from one camera, so no query has a match in another camera; "
            "if that is right, set TEST.CROSS_CAMERA False (results are marked with it); if not, "
            "put the camera into the file names (such as 0001_c2_0001.jpg), or use DATASETS.NAMES "
            "csv:FILE",
        )
    without = queries_without_match(query, gallery, cross_camera=cross_camera)
    if not without:
        return ()
    where = "in another camera of the gallery" if cross_camera else "in the gallery"
    named = examples([s.path for s in without], 5)
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
                f"{examples([str(pid) for pid in both], 5)}): networks were trained on "
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
    sizes = {
        path: _size(path) for path in {s.path for pair in pairs for side in pair for s in side}
    }
    candidates: set[str] = set()
    for pair in pairs:
        by_size: tuple[dict[int, list[str]], ...] = (defaultdict(list), defaultdict(list))
        for of_side, side in zip(by_size, pair, strict=True):
            for sample in side:
                of_side[sizes[sample.path]].append(sample.path)
        left, right = by_size
        for size in (left.keys() & right.keys()) - {0}:
            candidates.update(left[size], right[size])
    paths = sorted(candidates)
    with ThreadPoolExecutor() as pool:
        counted = Progress.over(paths, "comparing images")
        digests = zip(counted, pool.map(_hash, paths), strict=True)
        return {path: digest for path, digest in digests if digest is not None}


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
