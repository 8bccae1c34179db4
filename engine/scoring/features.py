"""What retrieval is scored on: one embedding, identity and camera for each image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError
from utils.precision import exact_float32

# Two embeddings whose cosine is above this are one as far as float32 can tell.
_SAME_COSINE = 1.0 - 1e-6
_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Features:
    """N images after the re-ID network; arrays and lists are taken for tensors too.

    Attributes:
        embeddings: Feature after the BNNeck (N, D), any floating type and scale, any device.
        pids: Identity numbers (N,); -1 is junk, which is left out wherever it occurs.
        camids: Cameras (N,).

    Raises:
        UserError: The three do not fit together.
    """

    embeddings: Tensor
    pids: Tensor
    camids: Tensor

    def __post_init__(self) -> None:
        for name in ("embeddings", "pids", "camids"):
            value = torch.as_tensor(getattr(self, name))
            if name != "embeddings" and value.is_floating_point() and len(value):
                raise UserError(f"{name} are of type {value.dtype}; expected whole numbers")
            object.__setattr__(self, name, value.detach())
        if self.embeddings.ndim != 2 or not self.embeddings.is_floating_point():
            raise UserError(
                f"embeddings are {tuple(self.embeddings.shape)} of type {self.embeddings.dtype}; "
                "expected a floating-point matrix with one row for each image"
            )
        count = len(self.embeddings)
        if self.pids.shape != (count,) or self.camids.shape != (count,):
            raise UserError(
                f"{count} embeddings came with pids {tuple(self.pids.shape)} and camids "
                f"{tuple(self.camids.shape)}; expected one of each for every embedding"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.embeddings)


@dataclass(frozen=True, eq=False)
class UnitFeatures:
    """Embeddings with what makes them unit vectors, so that no second copy of them is held.

    Attributes:
        embeddings: As they came (N, D).
        inverse_norm: Factor that makes each row a unit vector, float32 (N,); 0 for broken rows.
        broken: Rows without a direction: not finite, or zero; bool (N,).
        constant: Whether all rows point the same way although they show different people.
    """

    embeddings: Tensor
    inverse_norm: Tensor
    broken: Tensor
    constant: bool

    @classmethod
    def of(cls, features: Features) -> UnitFeatures:
        """Measure every row once."""
        matrix = features.embeddings
        with exact_float32(matrix.device):
            parts = [_inverse_norm(rows) for rows in _blocks(matrix)]
            inverse = torch.cat(parts) if parts else matrix.new_zeros(0, dtype=torch.float32)
            broken = inverse == 0
            return cls(matrix, inverse, broken, _is_constant(features, inverse, broken))

    @property
    def degenerate(self) -> bool:
        """Whether the network that made these says nothing about identity."""
        return self.constant or bool(self.broken.any())

    def unit_rows(self, index: Tensor) -> Tensor:
        """Return some rows as float32 unit vectors (len(index), D); broken rows are zeros."""
        rows = self.embeddings.index_select(0, index).float()
        rows *= self.inverse_norm.index_select(0, index).unsqueeze(1)
        return rows.masked_fill_(self.broken.index_select(0, index).unsqueeze(1), 0.0)


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a matrix as float32, a block at a time."""
    for start in range(0, len(matrix), _BLOCK_ROWS):
        yield matrix[start : start + _BLOCK_ROWS].float()


def _inverse_norm(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1)
    if not bool(((norm > 0) & norm.isfinite()).all()):
        # The squares of tiny or huge numbers leave float32; only then is float64 worth its time.
        norm = torch.linalg.vector_norm(rows.double(), dim=1)
    inverse = (1.0 / norm).float()
    return inverse.where(inverse.isfinite() & (inverse > 0), torch.zeros_like(inverse))


def _is_constant(features: Features, inverse: Tensor, broken: Tensor) -> bool:
    sound = (~broken).nonzero().squeeze(1)
    if len(sound) < 2 or len(torch.unique(features.pids[sound.to(features.pids.device)])) < 2:
        return False
    first = features.embeddings[sound[0]].float() * inverse[sound[0]]
    start = 0
    for rows in _blocks(features.embeddings):
        stop = start + len(rows)
        same = (rows @ first) * inverse[start:stop] >= _SAME_COSINE
        if not bool((same | broken[start:stop]).all()):
            return False
        start = stop
    return True
