"""Loaders of normalised batches on the device, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from data.desensitize import Desensitizer, draw_keys
from data.records import Batch, Sample
from data.samplers import IdentitySampler
from data.store import Pixels, PixelSource
from data.transforms import Augmentation, AugmentationDraw, normalize_batch
from layers.pixels import PixelSpace
from utils.errors import UserError
from utils.seeding import torch_generator


def _identities(samples: Sequence[Sample], label_of: Mapping[int, int]) -> Tensor:
    """Return labels, pids and cameras of N samples, int64 (3, N)."""
    rows = [(label_of.get(s.pid, -1), s.pid, s.camid) for s in samples]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3).T.contiguous()


def _batch(raw: Tensor, desensitized: Tensor, identities: Tensor, indices: Tensor) -> Batch:
    label, pid, camid = identities[:, indices].to(raw.device, non_blocking=True).unbind(0)
    return Batch(raw, desensitized, label, pid, camid, indices)


@dataclass(eq=False)
class TrainLoader:
    """P x K batches, augmented and normalised on the device.

    All randomness (identities, flips, crops, erased rectangles, noise) is a function of seed and
    epoch: an epoch is the same after a resume, and on every device. Each rank of a distributed run
    draws for the whole batch and uses its part.
    """

    source: PixelSource  # 8-bit images
    samples: Sequence[Sample]  # in the order of the source; ``Batch.index`` is an index into them
    label_of: Mapping[int, int]  # class index by pid
    _: KW_ONLY
    sampler: IdentitySampler  # plans batches of the usable samples of the source
    desensitizer: Desensitizer  # applied unless the source has done it
    desensitize: str  # "before" or "after" images are flipped and cropped
    augmentation: Augmentation  # applied with the same draw to raw and desensitized images
    seed: int  # of augmentation and noise
    device: torch.device  # of the batches

    def __post_init__(self) -> None:
        self._identities = _identities(self.samples, self.label_of)
        self._epoch = 1

    def __len__(self) -> int:
        """Return the number of batches of any epoch."""
        return len(self.sampler)

    @property
    def num_images(self) -> int:
        """Number of images that an epoch yields on this rank; repeated images count."""
        return len(self) * self.sampler.batch_size // self.sampler.world_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, from 1."""
        self._epoch = int(epoch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the epoch that was set."""
        plan = self.source.usable[self.sampler.plan(self._epoch)]
        generator = torch_generator(self.seed, "augmentation", self._epoch)
        count, part = self.sampler.batch_size, self.sampler.part
        for indices, pixels in zip(plan, self.source.batches(plan), strict=True):
            size = (pixels[0].shape[2], pixels[0].shape[3])
            draw = self.augmentation.draw(count, size, generator)[part]
            keys = draw_keys(count, generator)[part] if self.desensitizer.keyed else None
            augment: Callable[[Tensor, AugmentationDraw], Tensor] = self.augmentation
            if self.desensitize == "after":
                raw = pixels[0]
                if not self.desensitizer.cacheable:  # cacheable methods run on the CPU
                    raw = raw.to(self.device, non_blocking=True)
                pixels = self.augmentation.move(raw, draw), None
                augment = self.augmentation.normalize_and_erase
            on_device = _on_device(pixels, self.device, self.desensitizer, keys)
            draw = draw.to(self.device)
            raw, desensitized = (augment(images, draw) for images in on_device)
            yield _batch(raw, desensitized, self._identities, indices)


@dataclass(eq=False)
class EvalLoader:
    """All usable samples in order, without augmentation; the last batch may be smaller.

    A batch consists of the usable samples among ``batch_size`` consecutive samples. So a damaged
    image changes only its own batch, and any rank makes the same batches.

    Test-time noise is a function of seed and image, not of the batch.
    """

    source: PixelSource  # 8-bit images
    # In the order of the source. ``Batch.index`` is an index into them, also if some are left out.
    samples: Sequence[Sample]
    _: KW_ONLY
    desensitizer: Desensitizer  # applied unless the source has done it
    pixel_space: PixelSpace  # normalisation
    batch_size: int  # images in a batch, at least 1
    device: torch.device  # of the batches

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"the batch size is {self.batch_size}; expected 1 or more")
        self._identities = _identities(self.samples, {})

    @property
    def num_images(self) -> int:
        """Number of images that an iteration yields."""
        return len(self.source.usable)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._plan())

    def _plan(self) -> tuple[Tensor, ...]:
        """Return the indices of each batch; no batch is empty."""
        usable = self.source.usable
        if not len(usable):  # split would return one empty batch
            return ()
        _, counts = torch.unique_consecutive(usable // self.batch_size, return_counts=True)
        return usable.split(counts.tolist())

    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches; labels are -1."""
        plan = self._plan()
        for indices, pixels in zip(plan, self.source.batches(plan), strict=True):
            on_device = _on_device(pixels, self.device, self.desensitizer, None)
            raw, desensitized = (normalize_batch(images, self.pixel_space) for images in on_device)
            yield _batch(raw, desensitized, self._identities, indices)


def _on_device(
    pixels: Pixels, device: torch.device, desensitizer: Desensitizer, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return raw and desensitized images on the device, moved as 8 bits."""
    raw, desensitized = pixels
    if desensitized is None and desensitizer.cacheable:  # such methods run on the CPU
        desensitized = desensitizer(raw, keys)
    raw = raw.to(device, non_blocking=True)
    if desensitized is None:
        return raw, desensitizer(raw, keys)
    return raw, desensitized.to(device, non_blocking=True)
