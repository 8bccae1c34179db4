"""Random numbers: one seed given by the user, and a seed derived from it for each purpose."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, on all devices.

    For start weights, and for libraries that offer no other way. Other code that draws numbers
    uses its own generator (``torch_generator``).
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries use the old global generator
    torch.manual_seed(seed)  # includes CUDA's generators


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a seed in [0, 2**63) for one purpose, the same on every machine.

    Hashing makes the seeds of similar purposes unrelated; ``seed + epoch`` would give epoch 2 of
    seed 1 the numbers of epoch 1 of seed 2. The numbers of an epoch can be drawn again after a
    resume. ``parts`` are the purpose, such as ``"augmentation", epoch``; 1 and "1" differ.
    """
    # repr separates the parts: ("ab", "c") differs from ("a", "bc").
    digest = hashlib.sha256(repr((int(seed), *parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(seed: int, *parts: int | str) -> torch.Generator:
    """Return a new torch generator, on the CPU, seeded with ``derive_seed(seed, *parts)``."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


def numpy_generator(seed: int, *parts: int | str) -> np.random.Generator:
    """Return a new NumPy generator seeded with ``derive_seed(seed, *parts)``."""
    return np.random.default_rng(derive_seed(seed, *parts))
