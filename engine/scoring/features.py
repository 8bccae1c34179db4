"""Embeddings with identities and cameras: the input of every retrieval score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.device import exact_float32
from utils.errors import UserError

# Embeddings whose cosine is above this are equal up to float32 rounding.
_SAME_COSINE = 1.0 - 1e-6
_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Features:
    """Embeddings, identities and cameras of N images; arrays and lists become tensors.

    Attributes:
        embeddings: Feature after the BNNeck (N, D), any floating type, scale and device.
        pids: Identity numbers (N,); -1 marks junk, which every score ignores.
        camids: Camera numbers (N,).

    Raises:
        UserError: The shapes or types of the three do not fit together.
    """

    embeddings: Tensor
    pids: Tensor
    camids: Tensor

    def __post_init__(self) -> None:
        for name in ("embeddings", "pids", "camids"):
            value = torch.as_tensor(getattr(self, name))
            if name != "embeddings" and value.is_floating_point() and len(value):
                raise UserError(f"{name} have type {value.dtype}; expected whole numbers")
            object.__setattr__(self, name, value.detach())
        if self.embeddings.ndim != 2 or not self.embeddings.is_floating_point():
            raise UserError(
                f"embeddings have shape {tuple(self.embeddings.shape)} and type "
                f"{self.embeddings.dtype}; expected a floating-point matrix with one row for each "
                "image"
            )
        count = len(self.embeddings)
        if self.pids.shape != (count,) or self.camids.shape != (count,):
            raise UserError(
                f"there are {count} embeddings, but pids have shape {tuple(self.pids.shape)} and "
                f"camids {tuple(self.camids.shape)}; expected one of each for every embedding"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.embeddings)


@dataclass(frozen=True, eq=False)
class UnitFeatures:
    """Embeddings and the factors that normalise them, so that no second copy is needed."""

    embeddings: Tensor  # the given embeddings, unchanged (N, D)
    # factor that makes each row a unit vector, float32 (N,); 0 for broken rows
    inverse_norm: Tensor
    broken: Tensor  # rows without a direction (NaN, infinite or zero), bool (N,)
    constant: bool  # true if all rows have the same direction although they show several identities

    @classmethod
    def of(cls, features: Features) -> UnitFeatures:
        """Compute the norms of all rows."""
        matrix = features.embeddings
        with exact_float32(matrix.device):
            parts = [_inverse_norm(rows.float()) for rows in matrix.split(_BLOCK_ROWS)]
            inverse = torch.cat(parts)
            broken = inverse == 0
            return cls(matrix, inverse, broken, _is_constant(features, inverse, broken))

    @property
    def degenerate(self) -> bool:
        """True if some embeddings carry no information: broken rows, or all rows the same."""
        return self.constant or bool(self.broken.any())

    def unit_rows(self, index: Tensor) -> Tensor:
        """Return some rows as float32 unit vectors (len(index), D); broken rows are zeros."""
        rows = self.embeddings.index_select(0, index).float()
        rows *= self.inverse_norm.index_select(0, index).unsqueeze(1)
        return rows.masked_fill_(self.broken.index_select(0, index).unsqueeze(1), 0.0)


def _inverse_norm(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1)
    if not bool(((norm > 0) & norm.isfinite()).all()):
        # Squares of tiny or huge values leave the range of float32; float64 is slower.
        norm = torch.linalg.vector_norm(rows.double(), dim=1)
    inverse = (1.0 / norm).float()
    return inverse.where(inverse.isfinite() & (inverse > 0), torch.zeros_like(inverse))


def _is_constant(features: Features, inverse: Tensor, broken: Tensor) -> bool:
    valid = (~broken).nonzero().squeeze(1)
    if len(valid) < 2 or len(torch.unique(features.pids[valid.to(features.pids.device)])) < 2:
        return False
    reference = features.embeddings[valid[0]].float() * inverse[valid[0]]
    parts = (part.split(_BLOCK_ROWS) for part in (features.embeddings, inverse, broken))
    return all(
        bool(((rows.float() @ reference * scale >= _SAME_COSINE) | invalid).all())
        for rows, scale, invalid in zip(*parts, strict=True)
    )
