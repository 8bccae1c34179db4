"""Loaders of normalised batches on the device, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from data.desensitize import Desensitizer, draw_keys
from data.records import Batch, Sample
from data.samplers import IdentitySampler
from data.store import Pixels, PixelSource
from data.transforms import Augmentation, normalize_batch
from layers.pixels import PixelSpace
from utils.errors import UserError
from utils.seeding import torch_generator


class _Identities:
    """Labels, pids and cameras of samples as tensors, selected by index."""

    def __init__(self, samples: Sequence[Sample], label_of: Mapping[int, int]) -> None:
        rows = [(label_of.get(s.pid, -1), s.pid, s.camid) for s in samples]
        self._columns = torch.tensor(rows, dtype=torch.int64).view(-1, 3).T.contiguous()

    def batch(self, raw: Tensor, desensitized: Tensor, indices: Tensor) -> Batch:
        columns = self._columns[:, indices].to(raw.device, non_blocking=True)
        label, pid, camid = columns.unbind(0)
        return Batch(raw, desensitized, label, pid, camid, indices)


class TrainLoader:
    """P x K batches, augmented and normalised on the device.

    All randomness (identities, flips, crops, erased rectangles, noise) is a function of seed and
    epoch: an epoch is the same after a resume, and on every device. Each rank of a distributed run
    draws for the whole batch and uses its part.

    Args:
        source: 8-bit images.
        samples: The training samples, in the order of the source.
        label_of: Class index by pid.
        sampler: Plans batches of the usable samples of the source.
        desensitizer: Applied before augmentation, unless the source has done it.
        augmentation: Applied with the same draw to raw and desensitized images.
        seed: Seed of augmentation and noise.
        device: Device of the batches.

    Attributes:
        samples: As given; ``Batch.index`` is an index into it.
    """

    def __init__(
        self,
        source: PixelSource,
        samples: Sequence[Sample],
        label_of: Mapping[int, int],
        *,
        sampler: IdentitySampler,
        desensitizer: Desensitizer,
        augmentation: Augmentation,
        seed: int,
        device: torch.device,
    ) -> None:
        self.samples, self.source, self.sampler = tuple(samples), source, sampler
        self._identities = _Identities(samples, label_of)
        self._desensitizer, self._augmentation = desensitizer, augmentation
        self._seed, self._device, self._epoch = seed, device, 1

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
        generator = torch_generator(self._seed, "augmentation", self._epoch)
        for indices, pixels in zip(plan, self.source.batches(plan), strict=True):
            raw, desensitized = self._augmented(pixels, generator)
            yield self._identities.batch(raw, desensitized, indices)

    def _augmented(self, pixels: Pixels, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        size = (pixels[0].shape[2], pixels[0].shape[3])
        count, part = self.sampler.batch_size, self.sampler.part
        draw = self._augmentation.draw(count, size, generator)[part]
        keys = draw_keys(count, generator)[part] if self._desensitizer.keyed else None
        raw, desensitized = _on_device(pixels, self._device, self._desensitizer, keys)
        draw = draw.to(raw.device)
        return self._augmentation(raw, draw), self._augmentation(desensitized, draw)


class EvalLoader:
    """All usable samples in order, without augmentation; the last batch may be smaller.

    A batch consists of the usable samples among ``batch_size`` consecutive samples. So a damaged
    image changes only its own batch, and any rank makes the same batches.

    Test-time noise is a function of seed and image, not of the batch.

    Args:
        source: 8-bit images.
        samples: The samples, in the order of the source.
        desensitizer: Applied unless the source has done it.
        pixel_space: Normalisation.
        batch_size: Images in a batch.
        device: Device of the batches.

    Attributes:
        samples: As given; ``Batch.index`` is an index into it, also if images are left out.
        num_images: Number of images that an iteration yields.

    Raises:
        UserError: ``batch_size`` is below 1.
    """

    def __init__(
        self,
        source: PixelSource,
        samples: Sequence[Sample],
        *,
        desensitizer: Desensitizer,
        pixel_space: PixelSpace,
        batch_size: int,
        device: torch.device,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; expected 1 or more")
        self.samples, self.source = tuple(samples), source
        self.num_images = len(source.usable)
        self._identities = _Identities(samples, {})
        self._desensitizer, self._pixel_space = desensitizer, pixel_space
        self._batch_size, self._device = batch_size, device

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._plan())

    def _plan(self) -> tuple[Tensor, ...]:
        """Return the indices of each batch; no batch is empty."""
        usable = self.source.usable
        if not len(usable):  # split would return one empty batch
            return ()
        _, counts = torch.unique_consecutive(usable // self._batch_size, return_counts=True)
        return usable.split(counts.tolist())

    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches; labels are -1."""
        plan = self._plan()
        for indices, pixels in zip(plan, self.source.batches(plan), strict=True):
            raw, desensitized = _on_device(pixels, self._device, self._desensitizer, None)
            yield self._identities.batch(
                normalize_batch(raw, self._pixel_space),
                normalize_batch(desensitized, self._pixel_space),
                indices,
            )


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
