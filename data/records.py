"""Records that travel through the project: one picture, one data set, one batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One picture of one person.

    Attributes:
        path: Where the picture lies.
        pid: Identity number in the data set (0 may be a distractor, junk is dropped on loading).
        camid: Camera, counted from 0.
        subject: Label the picture is encrypted under, ``dataset/split/pid`` with split ``train`` or
            ``test``; query and gallery of a person share it.
    """

    path: str
    pid: int
    camid: int
    subject: str


@dataclass(frozen=True)
class DatasetSplits:
    """The parts of one data set; parts that a layout lacks are empty.

    Attributes:
        name: Name the data set was asked for by.
        train, query, gallery, val_query, val_gallery: Samples, in an order that names and numbers
            decide, and no file system.
        notes: Facts a result has to carry, e.g. which of two protocols was taken.
    """

    name: str
    train: tuple[Sample, ...] = ()
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    val_query: tuple[Sample, ...] = ()
    val_gallery: tuple[Sample, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def label_of(self) -> dict[int, int]:
        """Class index of each training pid: sorted pids become 0..N-1."""
        return {pid: label for label, pid in enumerate(sorted({s.pid for s in self.train}))}

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split to steer training by."""
        return bool(self.val_query and self.val_gallery)


@dataclass(frozen=True)
class Batch:
    """Images and identities of one step; B images of H x W pixels.

    Attributes:
        raw: Normalised camera images, float32 (B, 3, H, W).
        desensitized: The same after the conventional method, float32 (B, 3, H, W).
        label: Class index in training, int64 (B,); -1 for pids outside the training set.
        pid: Identity number, int64 (B,).
        camid: Camera, int64 (B,).
        index: Place of each image in the list the loader was made from, int64 (B,), on the CPU.
    """

    raw: Tensor
    desensitized: Tensor
    label: Tensor
    pid: Tensor
    camid: Tensor
    index: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.raw)

    @property
    def device(self) -> torch.device:
        """Device of the images."""
        return self.raw.device

    def laid_out(self, memory_format: torch.memory_format) -> Batch:
        """Return the same batch with its images in a memory format, copied only where they must."""
        return replace(
            self,
            raw=self.raw.contiguous(memory_format=memory_format),
            desensitized=self.desensitized.contiguous(memory_format=memory_format),
        )
