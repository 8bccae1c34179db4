"""Batches of P identities with K images: contents, epochs, division among ranks, errors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.samplers import IdentitySampler, _most_batches
from utils.errors import UserError


def _pids(counts: list[int]) -> list[int]:
    """Return the pids 7, 17, 27, ... in random order, each as often as its count."""
    pids = [10 * i + 7 for i, count in enumerate(counts) for _ in range(count)]
    return np.random.default_rng(0).permutation(pids).tolist()


def _sampler(pids: list[int], p: int = 3, k: int = 4, **options: int) -> IdentitySampler:
    return IdentitySampler(pids, batch_size=p * k, num_instances=k, **options)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=4, max_size=25),
    p=st.integers(1, 4),
    k=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_batch_is_p_different_identities_with_k_images_each(counts, p, k, seed):
    pids = np.array(_pids(counts))
    sampler = _sampler(pids.tolist(), p, k, seed=seed)
    plan = sampler.plan(epoch=seed % 7)
    assert plan.shape == (len(sampler), p * k)
    for batch in plan.numpy():
        identities = pids[batch].reshape(p, k)
        assert (identities == identities[:, :1]).all()
        assert len(set(identities[:, 0])) == p
        for images, pid in zip(batch.reshape(p, k), identities[:, 0], strict=True):
            assert len(set(images)) == min(k, (pids == pid).sum())
    # An image occurs twice in an epoch only if its identity has fewer than K images.
    repeated = [image for image, times in Counter(plan.flatten().tolist()).items() if times > 1]
    assert all((pids == pids[image]).sum() < k for image in repeated)


def test_equal_identities_are_all_used():
    sampler = _sampler(_pids([8] * 6))
    plan = sampler.plan(1)
    assert plan.shape == (4, 12)
    assert sorted(plan.flatten().tolist()) == list(range(48))


def test_surplus_changes_from_epoch_to_epoch():
    sampler = _sampler(_pids([9] * 7))  # 14 chunks: 4 batches of 3, and 2 chunks too many
    used = {image for epoch in range(1, 12) for image in sampler.plan(epoch).flatten().tolist()}
    assert used == set(range(63))


def test_an_identity_with_few_images_is_drawn_with_replacement():
    pids = [1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    for images in _sampler(pids).plan(1).view(-1, 4).tolist():
        if pids[images[0]] == 1:
            assert set(images) == {0, 1}


@pytest.mark.parametrize(
    ("chunks", "p", "expected"),
    [
        ([4, 4, 4], 3, 4),
        ([100, 1, 1], 3, 1),
        ([100, 2, 2], 2, 4),
        ([5, 5, 5, 5], 3, 6),
        ([1] * 7, 3, 2),
    ],
)
def test_number_of_batches_is_the_largest_possible(chunks, p, expected):
    assert _most_batches(np.array(chunks), p) == expected


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    pids = _pids([5, 9, 13, 2, 8, 8])
    sampler = _sampler(pids, seed=5)
    third = sampler.plan(3)
    sampler.plan(4)
    assert torch.equal(sampler.plan(3), third)
    assert torch.equal(_sampler(pids, seed=5).plan(3), third)
    assert not torch.equal(sampler.plan(4), third)
    assert not torch.equal(_sampler(pids, seed=6).plan(3), third)


def test_the_other_identities_of_a_batch_change_from_batch_to_batch():
    # If runs were assigned in order, the same identities would meet again and again.
    pids = np.array(_pids([16] * 60))
    plan = _sampler(pids.tolist(), p=10).plan(1).numpy()
    people = [frozenset(pids[batch]) for batch in plan]
    shared = [len(a & b) for i, a in enumerate(people) for b in people[:i]]
    assert np.mean(shared) < 3
    assert max(shared) < 9


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_batches_of_all_ranks_concatenated_are_the_batch_of_one_process(world_size):
    pids = _pids([5, 9, 13, 2, 8, 8, 7, 20])
    whole = _sampler(pids, p=6).plan(2)
    parts = [_sampler(pids, p=6, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.plan(2) for part in parts], 1), whole)
    for part in parts:  # whole identities
        assert (part.part.stop - part.part.start) % 4 == 0


def test_the_error_for_too_few_identities_contains_the_numbers():
    with pytest.raises(UserError, match="5 identities, but a batch needs 20") as caught:
        IdentitySampler(_pids([8] * 5), batch_size=80, num_instances=4)
    assert "80 images, 4 of each identity" in str(caught.value)
    with pytest.raises(UserError, match="0 identities"):
        IdentitySampler([], batch_size=4, num_instances=4)


def test_batches_that_cannot_be_divided_are_an_error():
    with pytest.raises(UserError, match="expected a multiple"):
        IdentitySampler(_pids([8] * 5), batch_size=10, num_instances=4)
    with pytest.raises(UserError, match="2 processes cannot share"):
        _sampler(_pids([8] * 5), p=3, world_size=2)
