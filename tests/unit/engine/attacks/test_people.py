"""Public and private persons never mix, and a smaller budget is part of a larger one."""

from __future__ import annotations

import pytest

from data.records import Sample
from engine.attacks.levels import choose_identities
from utils.errors import UserError


def samples(first: int, persons: int, images: int = 4) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"{pid}_{n}.jpg", pid, n % 2, f"set/x/{pid}")
        for pid in range(first, first + persons)
        for n in range(images)
    )


TRAIN, QUERY, GALLERY = samples(1, 12), samples(100, 9, 2), samples(100, 8) + samples(0, 1)


def cast(budget: int = 20, people: int = 50, seed: int = 1):  # type: ignore[no-untyped-def]
    return choose_identities(TRAIN, QUERY, GALLERY, budget=budget, people=people, seed=seed)


def test_roles_share_nobody() -> None:
    found = cast()
    roles = [{s.pid for s in role} for role in (found.public, found.validation, found.private)]
    assert not (roles[0] & roles[1] or roles[0] & roles[2] or roles[1] & roles[2])
    assert len(found.public) == 20


def test_held_out_persons_come_with_several_images() -> None:
    """An attack that sets images of one person against each other has to be tried on some."""
    train = samples(1, 60, 20)
    found = choose_identities(train, QUERY, GALLERY, budget=16, people=9, seed=1)
    pids = [s.pid for s in found.validation]
    assert len(pids) == 64
    assert {pids.count(pid) for pid in set(pids)} == {8}


def test_without_a_budget_all_images_of_public_persons_are_used() -> None:
    """Ten of 60 persons are held out, also those of whom no image was needed."""
    train = samples(1, 60, 20)
    found = choose_identities(train, QUERY, GALLERY, budget=0, people=9, seed=1)
    assert len(found.public) == 50 * 20
    large = choose_identities(samples(1, 60, 100), QUERY, GALLERY, budget=0, people=9, seed=1)
    assert len(large.public) == 4096


def test_private_persons_are_those_that_can_be_found() -> None:
    """Neither a distractor nor a query without gallery image takes part."""
    found = cast()
    assert {s.pid for s in found.private} == set(range(100, 108))
    assert sum(found.is_query) == 16
    assert len({s.pid for s in cast(people=6).private}) == 6


def test_budgets_are_nested_and_seeds_differ() -> None:
    assert cast(30).public[:20] == cast(20).public
    assert cast(seed=2).public != cast(seed=1).public


@pytest.mark.parametrize(
    ("train", "query", "budget", "words"),
    [
        (samples(1, 5), QUERY, 8, "5 public identities"),
        (TRAIN, samples(100, 5, 2), 8, "5 private identities"),
        (TRAIN, QUERY, 41, "--budget is 41"),
    ],
)
def test_too_few_are_refused(
    train: tuple[Sample, ...], query: tuple[Sample, ...], budget: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        choose_identities(train, query, GALLERY, budget=budget, people=50, seed=1)
