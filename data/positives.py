"""Before a score is computed: how many matches each query can have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data import problems as wrong
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample


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


def check_positives(splits: DatasetSplits, cross_camera: bool) -> tuple[Problem, ...]:
    """See before hours of training that the queries of validation and test can be scored.

    Args:
        splits: The data set; subsets it lacks are not looked at.
        cross_camera: TEST.CROSS_CAMERA: whether a match must come from another camera.

    Returns:
        A warning for each subset in which some queries have no match, naming them.

    Raises:
        DatasetError: All images come from one camera, or no query has a match.
    """
    found = []
    for title, query, gallery in (
        ("validation", splits.val_query, splits.val_gallery),
        ("test", splits.query, splits.gallery),
    ):
        if not query or not gallery:
            continue
        if cross_camera and len({s.camid for s in (*query, *gallery)}) == 1:
            raise wrong.single_camera(title)
        without = count_positives(query, gallery, cross_camera=cross_camera).without
        if not without:
            continue
        where = "in another camera of the gallery" if cross_camera else "in the gallery"
        offenders = wrong.examples([s.path for s in without], 5)
        if len(without) == len(query):
            raise DatasetError(
                "no-matches",
                f"none of the {len(query)} {title} queries has a match {where} ({offenders}); see that "
                "both folders are of the same data set and number their persons alike",
            )
        text = (
            f"{len(without)} of the {len(query)} {title} queries have no match {where} and are left "
            f"out of the scores: {offenders}"
        )
        found.append(Problem("queries-without-match", text))
    return tuple(found)
