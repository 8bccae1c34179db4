"""The records of the project: a sample, the splits of a data set, a batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One image of one person."""

    path: str  # the file
    pid: int  # identity; 0 may be a distractor; junk is dropped when the data set is loaded
    camid: int  # camera, from 0
    # Label of the encryption key, ``dataset/split/pid`` with split ``train`` or ``test``. Query and
    # gallery images of a person have the same subject.
    subject: str


@dataclass(frozen=True)
class DatasetSplits:
    """The subsets of one data set; subsets that a layout does not have are empty."""

    name: str  # the name under which it was loaded, as in DATASETS.NAMES
    # samples, in an order that depends on names and numbers, not on the file system
    train: tuple[Sample, ...] = ()
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    val_query: tuple[Sample, ...] = ()
    val_gallery: tuple[Sample, ...] = ()
    # facts that a report must contain, for example the protocol
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def label_of(self) -> dict[int, int]:
        """Class index of each training pid: sorted pids become 0..N-1."""
        return {pid: label for label, pid in enumerate(sorted({s.pid for s in self.train}))}

    @property
    def has_validation(self) -> bool:
        """Whether the data set has a validation split."""
        return bool(self.val_query and self.val_gallery)


@dataclass(frozen=True)
class Batch:
    """The images and identities of one step: B images of H x W pixels."""

    raw: Tensor  # normalised camera images, float32 (B, 3, H, W)
    desensitized: Tensor  # the same images after mosaic, blur or noise, float32 (B, 3, H, W)
    label: Tensor  # class index in training, int64 (B,); -1 for pids outside the training set
    pid: Tensor  # identity, int64 (B,)
    camid: Tensor  # camera, int64 (B,)
    index: Tensor  # index of each image in the loader's list of samples, int64 (B,), on the CPU

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.raw)

    @property
    def device(self) -> torch.device:
        """Device of the images."""
        return self.raw.device

    def laid_out(self, memory_format: torch.memory_format) -> Batch:
        """Return the batch with its images in a memory format; copies only if necessary."""
        return replace(
            self,
            raw=self.raw.contiguous(memory_format=memory_format),
            desensitized=self.desensitized.contiguous(memory_format=memory_format),
        )
