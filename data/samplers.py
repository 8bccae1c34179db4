"""P x K batches: P identities with K images each, planned a whole epoch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError
from utils.seeding import numpy_generator


class IdentitySampler:
    """Plans the batches of each epoch, a pure function of (seed, epoch).

    The images of an identity are shuffled and cut into chunks of K; an identity with fewer than K
    images gives one chunk, drawn with replacement. Each batch takes P chunks of P identities. The
    number of batches is the largest at which no batch holds an identity twice, the same in every
    epoch; only surplus chunks, drawn anew each epoch, are left out.

    Each rank of a distributed run takes whole identities of every batch: the batches of all ranks,
    side by side, are the batch of a single rank.

    Args:
        pids: Identity of each image.
        batch_size: Images in a batch, of all ranks together.
        num_instances: Images K of each identity in a batch.
        seed: What the plans are drawn from.
        rank: This process, counted from 0.
        world_size: Number of processes.

    Raises:
        UserError: If batch_size is no multiple of K, the identities of a batch cannot be shared out
            evenly among the ranks, or there are fewer identities than a batch needs.
    """

    def __init__(
        self,
        pids: Sequence[int],
        *,
        batch_size: int,
        num_instances: int,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        knobs = f"SOLVER.IMS_PER_BATCH {batch_size} / DATALOADER.NUM_INSTANCE {num_instances}"
        if num_instances < 1 or batch_size < 1 or batch_size % num_instances:
            raise UserError(f"{knobs} is no whole number of identities; expected a multiple")
        self.num_identities = batch_size // num_instances
        if self.num_identities % world_size:
            raise UserError(
                f"a batch has {self.num_identities} identities ({knobs}), which {world_size} "
                "processes cannot share evenly; change either, or the number of processes"
            )
        self.num_instances, self.seed = num_instances, seed
        self.rank, self.world_size = rank, world_size
        order = np.argsort(np.asarray(pids, dtype=np.int64), kind="stable")
        found, starts = np.unique(np.asarray(pids, dtype=np.int64)[order], return_index=True)
        self._images = np.split(order, starts[1:]) if len(found) else []
        if len(self._images) < self.num_identities:
            raise UserError(
                f"the training set has {len(self._images)} identities, but a batch needs "
                f"{self.num_identities} ({knobs}); lower SOLVER.IMS_PER_BATCH or raise "
                "DATALOADER.NUM_INSTANCE"
            )
        self._chunks = np.array([max(1, len(images) // num_instances) for images in self._images])
        self.num_batches = _most_batches(self._chunks, self.num_identities)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.num_batches

    @property
    def batch_size(self) -> int:
        """Images in a batch of all ranks together."""
        return self.num_identities * self.num_instances

    @property
    def part(self) -> slice:
        """This rank's share of a whole batch."""
        share = self.batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def plan(self, epoch: int) -> Tensor:
        """Batches of an epoch on this rank: places in the list of images.

        Args:
            epoch: Any number; each has its own plan.

        Returns:
            int64 (batches, images of this rank), images of an identity side by side.
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
        """One entry per chunk in use; entries of an identity together, identities shuffled."""
        capped = np.minimum(self._chunks, self.num_batches)
        chunks = rng.permutation(np.repeat(np.arange(len(capped)), capped))
        used = np.bincount(chunks[: self.num_batches * self.num_identities], minlength=len(capped))
        order = rng.permutation(len(capped))
        return np.repeat(order, used[order])

    def _drawn_chunks(self, images: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        if len(images) < self.num_instances:
            # Each image once before any is repeated.
            extra = rng.choice(images, self.num_instances - len(images))
            return rng.permutation(np.concatenate([images, extra]))[None, :][:count]
        return rng.permutation(images)[: count * self.num_instances].reshape(-1, self.num_instances)


def _most_batches(chunks: np.ndarray, num_identities: int) -> int:
    """Largest T with sum(min(chunks, T)) >= num_identities * T, by bisection.

    T batches of distinct identities exist exactly then: nobody can appear in more than T of them.
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
    """Deal runs of equal entries, none longer than num_batches, out to batches without repetition.

    Every row of num_batches entries puts one into each batch, in random order. A run that goes on
    from the row before takes batches it is not in yet; there are always enough of them.

    Returns:
        (num_batches, len(entries) / num_batches), the entries of each batch.
    """
    rows = entries.reshape(-1, num_batches)
    dealt = np.empty_like(rows)
    for row, entry_row in enumerate(rows):
        carried = 0
        order = rng.permutation(num_batches)
        if row and rows[row - 1, -1] == entry_row[0]:
            carried = int((entry_row == entry_row[0]).sum())
            free = dealt[row - 1][order] != entry_row[0]
            first = order[free][:carried]
            rest = order[~np.isin(order, first)]
            order = np.concatenate([first, rest])
        dealt[row, order] = entry_row
    return rng.permuted(dealt.T, axis=1)
