"""Batches of P identities with K images each, planned for a whole epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.seeding import numpy_generator


@dataclass(eq=False)
class IdentitySampler:
    """Plans the batches of each epoch as a pure function of seed and epoch.

    The images of an identity are shuffled and divided into chunks of K. An identity with fewer than
    K images has one chunk, drawn with replacement. A batch is P chunks of P identities. Every epoch
    has the largest number of batches for which no batch contains an identity twice. Surplus chunks
    are left out; each epoch draws which ones.

    Each rank of a distributed run takes whole identities of every batch. The batches of all ranks,
    concatenated, are the batch of a single process.

    Raises:
        UserError: ``batch_size`` is not a multiple of K, its identities cannot be divided evenly
            among the ranks, or there are fewer identities than a batch needs.
    """

    pids: Sequence[int]  # identity of each image
    _: KW_ONLY
    batch_size: int  # images in a batch of all ranks together
    num_instances: int  # images K of each identity in a batch
    seed: int = 1  # of the plans
    rank: int = 0  # of this process, from 0
    world_size: int = 1  # number of processes

    def __post_init__(self) -> None:
        batch_size, num_instances = self.batch_size, self.num_instances
        if num_instances < 1 or batch_size < 1 or batch_size % num_instances:
            raise UserError(
                f"a batch has {batch_size} images, {num_instances} of each identity; expected a "
                f"multiple of {num_instances}"
            )
        self.num_identities = batch_size // num_instances
        if self.num_identities % self.world_size:
            raise UserError(
                f"a batch of {batch_size} images with {num_instances} of each identity has "
                f"{self.num_identities} identities, which {self.world_size} processes cannot share "
                "evenly; change the batch size or the number of processes"
            )
        pids = np.asarray(self.pids, dtype=np.int64)
        order = np.argsort(pids, kind="stable")
        identities, starts = np.unique(pids[order], return_index=True)
        self._images = np.split(order, starts[1:]) if len(identities) else []
        if len(self._images) < self.num_identities:
            raise UserError(
                f"the training set has {len(self._images)} identities, but a batch needs "
                f"{self.num_identities} ({batch_size} images, {num_instances} of each identity); "
                "use smaller batches, or more images of each identity"
            )
        self._chunks = np.array([max(1, len(images) // num_instances) for images in self._images])
        self.num_batches = _most_batches(self._chunks, self.num_identities)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.num_batches

    @property
    def part(self) -> slice:
        """This rank's part of a batch."""
        share = self.batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def plan(self, epoch: int) -> Tensor:
        """Return the image indices of an epoch's batches on this rank.

        Returns:
            int64 (batches, images of this rank); images of an identity are adjacent.
        """
        rng = numpy_generator(self.seed, "identities", epoch)
        slots = _spread(self._drawn_identities(rng), self.num_batches, rng)
        batches = np.empty((*slots.shape, self.num_instances), dtype=np.int64)
        for identity, images in enumerate(self._images):
            where = np.nonzero(slots == identity)
            batches[where] = self._drawn_chunks(images, len(where[0]), rng)
        whole = torch.from_numpy(batches.reshape(self.num_batches, -1))
        return whole[:, self.part].contiguous()

    def _drawn_identities(self, rng: np.random.Generator) -> np.ndarray:
        """Return the identity of each chunk in use; equal identities adjacent, in random order."""
        capped = np.minimum(self._chunks, self.num_batches)
        chunks = rng.permutation(np.repeat(np.arange(len(capped)), capped))
        used = np.bincount(chunks[: self.num_batches * self.num_identities], minlength=len(capped))
        order = rng.permutation(len(capped))
        return np.repeat(order, used[order])

    def _drawn_chunks(self, images: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        if len(images) < self.num_instances:
            # Every image occurs before one is repeated.
            extra = rng.choice(images, self.num_instances - len(images))
            return rng.permutation(np.concatenate([images, extra]))[None, :][:count]
        return rng.permutation(images)[: count * self.num_instances].reshape(-1, self.num_instances)


def _most_batches(chunks: np.ndarray, num_identities: int) -> int:
    """Return the largest T with sum(min(chunks, T)) >= num_identities * T, by bisection.

    This condition is necessary and sufficient for T batches of distinct identities, as an identity
    occurs in at most T batches.
    """
    low, high = 1, int(chunks.sum()) // num_identities
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(chunks, middle).sum() >= num_identities * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _spread(entries: np.ndarray, num_batches: int, rng: np.random.Generator) -> np.ndarray:
    """Distribute runs of equal entries over batches such that no batch has an entry twice.

    No run is longer than ``num_batches``. Each row of ``num_batches`` entries adds one entry to
    every batch, in random order. A run that continues from the previous row gets batches that do
    not contain it yet; there are always enough of them.

    Returns:
        (num_batches, len(entries) / num_batches), the entries of each batch.
    """
    rows = entries.reshape(-1, num_batches)
    assigned = np.empty_like(rows)
    for row, entry_row in enumerate(rows):
        carried = 0
        order = rng.permutation(num_batches)
        if row and rows[row - 1, -1] == entry_row[0]:
            carried = int((entry_row == entry_row[0]).sum())
            free = assigned[row - 1][order] != entry_row[0]
            free_batches = order[free][:carried]
            rest = order[~np.isin(order, free_batches)]
            order = np.concatenate([free_batches, rest])
        assigned[row, order] = entry_row
    return rng.permuted(assigned.T, axis=1)
