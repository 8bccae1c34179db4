"""Random numbers: one seed of the user, and one derived from it for each place that draws."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on all devices.

    Code that draws takes a generator of its own (see ``torch_generator``); this is for weights'
    starting values and for libraries that offer no other way.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries use the old global generator
    torch.manual_seed(seed)  # CUDA's generators too


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a seed in [0, 2**63) for one purpose, the same on every machine.

    Hashing keeps seeds of neighbouring purposes unrelated (``seed + epoch`` would give epoch 2 of
    seed 1 the draws of epoch 1 of seed 2), and lets an epoch be drawn again after a resume.

    Args:
        seed: The user's seed.
        parts: What it is for, such as ``"augmentation", epoch``. 1 and "1" are different parts.
    """
    # repr keeps the parts apart: ("ab", "c") is not ("a", "bc").
    digest = hashlib.sha256(repr((int(seed), *parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, *parts: int | str) -> torch.Generator:
    """Return a new torch generator, on the CPU, seeded with ``derive_seed(seed, *parts)``."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


def numpy_generator(seed: int, *parts: int | str) -> np.random.Generator:
    """Return a new NumPy generator seeded with ``derive_seed(seed, *parts)``."""
    return np.random.default_rng(derive_seed(seed, *parts))
