"""Before a score is computed: how many matches each query can have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data import problems as wrong
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample
from utils.logger import get_logger


@dataclass(frozen=True)
class PositiveCounts:
    """Matches per query.

    Attributes:
        counts: Number of valid matches of each query, in the order of the queries.
        without: Queries that have none; scores leave them out.
    """

    counts: tuple[int, ...]
    without: tuple[Sample, ...]


def count_positives(
    query: Sequence[Sample], gallery: Sequence[Sample], *, cross_camera: bool
) -> PositiveCounts:
    """Count gallery images of each query's identity, in other cameras only if ``cross_camera``."""
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
    """See that queries can be scored against a gallery.

    Args:
        query: Queries.
        gallery: Gallery.
        cross_camera: TEST.CROSS_CAMERA: whether a match must come from another camera.
        title: Name of the pair in sentences.

    Returns:
        A warning if some queries have no match, naming the first of them.

    Raises:
        DatasetError: There is nothing to score, all images come from one camera, or no query has a
            match.
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
    offenders = wrong.examples([s.path for s in without], 5)
    if len(without) == len(query):
        raise DatasetError(
            "no-matches",
            f"none of the {len(query)} {title} queries has a match {where} ({offenders}); see that "
            "query and gallery belong together and number their persons alike",
        )
    text = (
        f"{len(without)} of the {len(query)} {title} queries have no match {where} and are left "
        f"out of the scores: {offenders}"
    )
    return (Problem("queries-without-match", text),)


def check_positives(
    query: Sequence[Sample], gallery: Sequence[Sample], *, cross_camera: bool, title: str = "test"
) -> tuple[Problem, ...]:
    """Do as ``positive_problems``, and log what it warns of."""
    found = positive_problems(query, gallery, cross_camera=cross_camera, title=title)
    for problem in found:
        get_logger().warning(problem.text)
    return found


def stranger_problems(splits: DatasetSplits) -> tuple[Problem, ...]:
    """Warn of persons in training and test, for data sets in which a number is one person.

    Scores, attacks and thresholds are all meant for people whom no network was trained on.
    """
    trained = {sample.pid for sample in splits.train}
    found = []
    for title, samples in (
        ("test", (*splits.query, *splits.gallery)),
        ("validation", (*splits.val_query, *splits.val_gallery)),
    ):
        both = sorted(trained & {sample.pid for sample in samples})
        if both:
            text = (
                f"{len(both)} persons are both in the training and in the {title} set (pid "
                f"{wrong.examples([str(pid) for pid in both], 5)}): networks know them, and scores "
                "and attacks look better than on strangers; leave each on one side, or number "
                "them apart if they are not the same people"
            )
            found.append(Problem("persons-not-strangers", text))
    return tuple(found)
