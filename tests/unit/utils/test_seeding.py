from __future__ import annotations

import random

import numpy as np
import torch

from utils.seeding import derive_seed, numpy_generator, seed_everything, torch_generator


def test_derived_seeds_are_the_same_everywhere_and_for_ever() -> None:
    assert derive_seed(1) == 1469723619026552644
    assert derive_seed(1, "augmentation", 3) == 1323941377487606520


def test_derived_seeds_of_neighbours_differ() -> None:
    parts = [(), (1,), ("1",), (1, 1), ("ab", "c"), ("a", "bc"), ("epoch", 1), ("epoch", 2)]
    seeds = {derive_seed(seed, *part) for seed in range(20) for part in parts}
    assert len(seeds) == 20 * len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_integer_of_any_kind_is_the_same_seed() -> None:
    assert derive_seed(np.int64(5), "x") == derive_seed(5, "x") == derive_seed(True + 4, "x")


def test_generators_repeat_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    draws = [torch.rand(3, generator=torch_generator(1, "crop", 2)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_generator(1, 2).random() == numpy_generator(1, 2).random()
    assert numpy_generator(1, 2).random() != numpy_generator(1, 3).random()


def test_seed_everything_repeats_all_global_draws() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seed_everything(2**40 + 1)
    first = draw()
    seed_everything(2**40 + 1)
    assert draw() == first
