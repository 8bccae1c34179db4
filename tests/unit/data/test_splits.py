"""Validation splits and the division of persons, as properties of random data sets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.problems import DatasetError, queries_without_match
from data.records import Sample
from data.splits import divide_persons, split_as_published, split_by_identity

# Per identity, the number of images in each camera.
IMAGES = st.lists(
    st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any), min_size=2, max_size=30
)


def samples(images: list[list[int]]) -> list[Sample]:
    return [
        Sample(f"{pid:04d}_c{camera + 1}_{number}.jpg", pid, camera, f"x/train/{pid}")
        for pid, cameras in enumerate(images)
        for camera, count in enumerate(cameras)
        for number in range(count)
    ]


@given(images=IMAGES, seed=st.integers(0, 5))
def test_identity_split(images: list[list[int]], seed: int) -> None:
    everything = samples(images)
    several = len({s.camid for s in everything}) > 1
    eligible = sum(1 for c in images if (sum(map(bool, c)) if several else sum(c)) > 1)
    if not eligible:
        with pytest.raises(DatasetError, match="two cameras" if several else "two images"):
            split_by_identity(everything, seed)
        return
    split = split_by_identity(everything, seed)
    held_out = {s.pid for s in (*split["val_query"], *split["val_gallery"])}
    assert len(held_out) == min(max(1, round(0.2 * len(images))), eligible, len(images) - 1)
    assert not held_out & {s.pid for s in split["train"]}
    assert sorted((*split["train"], *split["val_query"], *split["val_gallery"]), key=str) == sorted(
        everything, key=str
    )
    pairs = [(s.pid, s.camid) for s in split["val_query"]]
    assert len(pairs) == len(set(pairs))
    budget = max(1, int(0.2 * (len(split["val_query"]) + len(split["val_gallery"]))))
    assert 1 <= len(split["val_query"]) <= budget
    assert not queries_without_match(split["val_query"], split["val_gallery"], cross_camera=several)
    shuffled = everything[:]
    random.Random(seed).shuffle(shuffled)
    assert split_by_identity(shuffled, seed) == split


def test_people_of_a_single_camera_are_split() -> None:
    split = split_by_identity(samples([[4]] * 10 + [[1]] * 10), 1)
    asked = [s.pid for s in split["val_query"]]
    assert len(asked) == len(set(asked)) == 3  # a fifth of the 16 images of 4 people
    assert not queries_without_match(split["val_query"], split["val_gallery"], cross_camera=False)


def test_every_identity_has_a_query_before_any_has_two() -> None:
    split = split_by_identity(samples([[3, 3, 3]] * 20), 1)  # 4 persons, 36 images, 7 queries
    asked = [s.pid for s in split["val_query"]]
    assert len(asked) == 7
    assert max(map(asked.count, asked)) == 2
    assert len(set(asked)) == 4


def test_the_identities_with_two_queries_are_random() -> None:
    everything = samples([[3, 3, 3]] * 20)
    places = set()
    for seed in range(8):
        split = split_by_identity(everything, seed)
        asked = [s.pid for s in split["val_query"]]
        once = [pid for pid in set(asked) if asked.count(pid) == 1]
        places |= {sorted(set(asked)).index(pid) for pid in once}
    assert len(places) > 1


def test_another_seed_is_another_split() -> None:
    everything = samples([[3, 3]] * 20)
    assert split_by_identity(everything, 1) != split_by_identity(everything, 2)


def test_published_split_is_the_first_fifth_of_the_files() -> None:
    everything = samples([[5, 5]] * 10)
    split = split_as_published(everything, 1)
    held_out = sorted((*split["val_query"], *split["val_gallery"]), key=lambda s: s.path)
    assert held_out == sorted(everything, key=lambda s: s.path)[:20]
    assert len(split["val_query"]) == 4
    assert len(split["train"]) == 80
    assert split == split_as_published(everything[::-1], 1)
    with pytest.raises(DatasetError, match="too few"):
        split_as_published(everything[:10], 1)


@pytest.mark.parametrize(
    ("queried", "others", "held_out"),
    [(3, 47, 1), (10, 40, 5), (12, 38, 6), (20, 30, 10), (3, 0, 1)],
)
def test_persons_are_divided_so_that_validation_and_test_have_queries(
    queried: int, others: int, held_out: int
) -> None:
    """A person with one camera cannot be queried, and a set may consist mostly of such persons."""
    everything = samples([[2, 2]] * queried + [[3]] * others)
    parts = divide_persons(everything)
    pids = {name: {s.pid for s in part} for name, part in parts.items()}
    for query, gallery in (("val_query", "val_gallery"), ("query", "gallery")):
        assert pids[query] == pids[gallery]
        assert len(pids[query]) == held_out
        assert not queries_without_match(parts[query], parts[gallery], cross_camera=True)
    assert not pids["train"] & (pids["val_query"] | pids["query"])
    assert sum(map(len, parts.values())) == len(everything)


@settings(max_examples=40)
@given(images=IMAGES)
def test_every_camera_of_a_divided_person_has_a_query_while_all_keep_a_match(
    images: list[list[int]],
) -> None:
    everything = samples(images)
    cross_camera = len({s.camid for s in everything}) > 1
    try:
        parts = divide_persons(everything)
    except DatasetError:
        return

    def misses(query: list[Sample], gallery: list[Sample]) -> bool:
        return bool(queries_without_match(query, gallery, cross_camera=cross_camera))

    for query, gallery in (("val_query", "val_gallery"), ("query", "gallery")):
        asked, left = list(parts[query]), list(parts[gallery])
        pairs = {(s.pid, s.camid) for s in asked}
        assert len(pairs) == len(asked)
        assert {s.pid for s in asked} == {s.pid for s in left} != set()
        assert not misses(asked, left)
        for number, sample in enumerate(left):
            if (sample.pid, sample.camid) not in pairs:
                assert misses([*asked, sample], left[:number] + left[number + 1 :])
