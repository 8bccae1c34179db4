"""All processes of a start agree on its number, whatever earlier starts left in the store."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from torch import distributed

from engine.distributed.roll_call import number_of_start
from utils.errors import UserError


def started(
    store: distributed.Store, ranks: tuple[int, ...], size: int, patience_s: float = 60
) -> list[Future[int]]:
    """Let threads stand for processes."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        return [threads.submit(number_of_start, store, rank, size, patience_s) for rank in ranks]


def numbers(store: distributed.Store, ranks: tuple[int, ...]) -> list[int]:
    return [found.result() for found in started(store, ranks, len(ranks))]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_has_its_number(order: tuple[int, ...]) -> None:
    store = distributed.HashStore()
    assert [numbers(store, order) for _ in range(3)] == [[1] * 3, [2] * 3, [3] * 3]
    assert numbers(store, (0, 1)) == [4, 4]  # a machine has left


@pytest.mark.parametrize("there", [(0,), (1,), (0, 2)], ids=str)
def test_a_start_that_never_came_together_confuses_no_later_one(there: tuple[int, ...]) -> None:
    store = distributed.HashStore()
    for found in started(store, there, 3, patience_s=0.3):
        found.exception()  # some wait in vain, some have been answered
    before = 0 if 0 not in there else 1
    assert numbers(store, (2, 0, 1)) == [before + 1] * 3


def test_who_is_missing_is_named() -> None:
    (found,) = started(distributed.HashStore(), (0,), 3, patience_s=0.3)
    with pytest.raises(UserError, match=r"rank 1, 2 has not come within 0.3 s; see that every"):
        found.result()
