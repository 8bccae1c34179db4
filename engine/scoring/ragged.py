"""Lists of different lengths as one array and the places where each list starts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ragged:
    """One list of numbers for each of Q queries, one after the other.

    Attributes:
        values: The lists' content.
        offsets: Where each list starts, and the end (Q + 1,).
    """

    values: Indices
    offsets: Indices

    def __getitem__(self, index: int) -> Indices:
        """Return one list."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        """Return the number of lists."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Indices:
        """Length of every list (Q,)."""
        return np.diff(self.offsets)

    def take(self, index: Indices) -> Ragged:
        """Return some of the lists, in the given order."""
        return Ragged(self.values[self.places(index)], offsets_of(self.lengths[index]))

    def places(self, index: Indices) -> Indices:
        """Return where in ``values`` some of the lists lie, one list after the other."""
        return spans(self.offsets[index], self.lengths[index])


def offsets_of(lengths: Indices) -> Indices:
    """Return where each list starts, and the end.

    Example:
        >>> offsets_of(np.array([2, 0, 3])).tolist()
        [0, 2, 2, 5]
    """
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def spans(starts: Indices, lengths: Indices) -> Indices:
    """Return start, start + 1, ... of every span, one after the other.

    Example:
        >>> spans(np.array([7, 0]), np.array([2, 3])).tolist()
        [7, 8, 0, 1, 2]
    """
    offsets = offsets_of(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
