from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.checks import CheckOptions, _fit_problems
from data.positives import check_positives, count_positives, positive_problems
from data.problems import DatasetError
from data.records import DatasetSplits, Sample

PEOPLE = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=20)


def make(people: list[tuple[int, int]], prefix: str = "q") -> list[Sample]:
    return [Sample(f"{prefix}{i}", pid, cam, "") for i, (pid, cam) in enumerate(people)]


@given(PEOPLE, PEOPLE, st.booleans())
def test_counts_match_a_naive_loop(
    query: list[tuple[int, int]], gallery: list[tuple[int, int]], cross: bool
) -> None:
    found = count_positives(make(query), make(gallery, "g"), cross_camera=cross)
    naive = [sum(p == q and (c != k or not cross) for p, c in gallery) for q, k in query]
    assert list(found.counts) == naive
    assert len(found.without) == naive.count(0)


def test_offenders_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("reid_baseline").propagate = True
    query, gallery = make([(1, 0), (2, 0)]), make([(1, 1), (2, 0)], "g")
    with caplog.at_level(logging.WARNING, "reid_baseline"):
        (problem,) = check_positives(query, gallery, cross_camera=True)
    assert problem.text.startswith("1 of the 2 test queries have no match in another camera")
    assert problem.text.endswith(": q1")
    assert problem.text in caplog.messages
    assert positive_problems(query, gallery, cross_camera=False) == ()


@pytest.mark.parametrize(
    ("query", "gallery", "message"),
    [
        ([(1, 0)], [(2, 1)], "none of the 1 test queries"),
        ([(1, 0)], [(1, 0)], "TEST.CROSS_CAMERA False"),
        ([], [(1, 0)], "0 queries and 1 gallery"),
        ([(1, 0)], [], "1 queries and 0 gallery"),
    ],
)
def test_nothing_to_score_is_an_error(
    query: list[tuple[int, int]], gallery: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        positive_problems(make(query), make(gallery), cross_camera=True)


def test_a_validation_that_cannot_be_scored_is_found_beside_a_good_test() -> None:
    options = CheckOptions(batch_size=1, num_instances=1)
    query, gallery = tuple(make([(1, 0)])), tuple(make([(1, 1)], "g"))
    splits = DatasetSplits("mine", tuple(make([(2, 0)])), query, gallery)
    assert _fit_problems(splits, options) == []
    lost = replace(splits, val_query=query, val_gallery=tuple(make([(3, 1)], "g")))
    (problem,) = _fit_problems(lost, options)
    assert problem.text.startswith("none of the 1 validation queries")
