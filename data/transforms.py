"""Training augmentation of whole batches, with one draw for raw and desensitized images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.pixels import PixelSpace
from utils.errors import UserError

# Images (0.4 MB each at 256 x 128) that stay in a CPU core's second-level cache as floats.
_CPU_CHUNK = 4
_ERASING_AREA = (0.02, 0.4)
_ERASING_ASPECT = (0.3, 3.3)
_ERASING_ATTEMPTS = 100


@dataclass(frozen=True)
class AugmentationDraw:
    """What is done to each image of a batch.

    Attributes:
        flip: Whether it is mirrored, bool (B,).
        top, left: Corner of the crop in the padded image, px, int64 (B,).
        box: Erased rectangle (top, left, height, width) in the cropped image, px, int64 (B, 4);
            height 0 where nothing is erased.
    """

    flip: Tensor
    top: Tensor
    left: Tensor
    box: Tensor

    def __getitem__(self, part: slice) -> AugmentationDraw:
        """Return the draws of some images."""
        return AugmentationDraw(self.flip[part], self.top[part], self.left[part], self.box[part])

    def to(self, device: torch.device) -> AugmentationDraw:
        """Move to a device, in one copy that does not make the host wait."""
        if device == self.flip.device:
            return self
        columns = torch.stack([self.flip.long(), self.top, self.left, *self.box.unbind(1)])
        flip, top, left, *box = columns.to(device, non_blocking=True).unbind(0)
        return AugmentationDraw(flip.bool(), top, left, torch.stack(box, 1))


class Augmentation:
    """Flip, zero padding and random crop in 8 bits, normalisation, random erasing.

    Random erasing (Zhong et al., 2017) fills a rectangle with PIXEL_MEAN in normalised space, as
    the published method does; padding is black, since it comes before normalisation.

    Args:
        pixel_space: Normalisation.
        flip_probability: Probability of a mirror image, in [0, 1].
        padding: Zeros on every side before the crop, px.
        erase_probability: Probability that a rectangle is erased, in [0, 1].

    Raises:
        UserError: If a probability is outside [0, 1] or the padding negative.
    """

    def __init__(
        self,
        pixel_space: PixelSpace,
        *,
        flip_probability: float = 0.5,
        padding: int = 10,
        erase_probability: float = 0.5,
    ) -> None:
        for key, value in (("PROB", flip_probability), ("RE_PROB", erase_probability)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"INPUT.{key} is {value}; expected a probability in [0, 1]")
        if padding < 0:
            raise UserError(f"INPUT.PADDING is {padding}; expected 0 or more pixels")
        self.pixel_space, self.padding = pixel_space, int(padding)
        self.flip_probability, self.erase_probability = flip_probability, erase_probability

    def draw(
        self, count: int, size: tuple[int, int], generator: torch.Generator
    ) -> AugmentationDraw:
        """Draw what happens to each image.

        Args:
            count: Images B.
            size: Height and width, px.
            generator: On the CPU, so that every device gets the same draws.
        """
        uniform = torch.rand(count, 4, generator=generator)
        corners = uniform[:, 1:3].mul(2 * self.padding + 1).long().clamp_(max=2 * self.padding)
        box = _draw_boxes(count, size, generator)
        box[uniform[:, 3] >= self.erase_probability] = 0
        return AugmentationDraw(
            uniform[:, 0] < self.flip_probability, corners[:, 0], corners[:, 1], box
        )

    def __call__(self, images: Tensor, draw: AugmentationDraw) -> Tensor:
        """Augment and normalise.

        Args:
            images: uint8 (B, 3, H, W).
            draw: What to do; best on the device of the images, so that it travels once for all.

        Returns:
            Normalised float32 (B, 3, H, W) on the device of the images.
        """
        fill = self.pixel_space.mean_on(images.device)
        if images.device.type != "cpu":
            draw = draw.to(images.device)
            moved = _move_by_windows(images, draw, self.padding)
            return _erase_by_mask(self.pixel_space.normalize(moved), draw.box, fill)
        augmented = torch.empty(images.shape)
        for start in range(0, len(images), _CPU_CHUNK):
            part = slice(start, start + _CPU_CHUNK)
            moved = _move_by_slices(images[part], draw[part], self.padding)
            self.pixel_space.normalize(moved, out=augmented[part])
        return _erase_by_slices(augmented, draw.box, fill)


def normalize_batch(images: Tensor, pixel_space: PixelSpace) -> Tensor:
    """Normalise uint8 (B, 3, H, W) as :class:`Augmentation` does, without augmenting."""
    if images.device.type != "cpu":
        return pixel_space.normalize(images)
    normalised = torch.empty(images.shape)
    for start in range(0, len(images), _CPU_CHUNK):
        part = slice(start, start + _CPU_CHUNK)
        pixel_space.normalize(images[part], out=normalised[part])
    return normalised


def _draw_boxes(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a rectangle per image, int64 (B, 4); zeros where no attempt fits into the image.

    Area and aspect (height over width) are uniform; as published, a rectangle that is as high or as
    wide as the image is drawn again.
    """
    height, width = size
    area, aspect = torch.rand(2, count, _ERASING_ATTEMPTS, generator=generator).unbind(0)
    area = (area * (_ERASING_AREA[1] - _ERASING_AREA[0]) + _ERASING_AREA[0]) * (height * width)
    aspect = aspect * (_ERASING_ASPECT[1] - _ERASING_ASPECT[0]) + _ERASING_ASPECT[0]
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < height) & (widths < width) & (heights > 0) & (widths > 0)
    first = fits.int().argmax(1, keepdim=True)
    extent = torch.cat([heights.gather(1, first), widths.gather(1, first)], 1)
    extent *= fits.any(1, keepdim=True)
    room = torch.tensor(size) - extent
    corner = (torch.rand(count, 2, generator=generator) * (room + 1)).long()
    return torch.cat([torch.minimum(corner, room), extent], 1)


def _move_by_slices(images: Tensor, draw: AugmentationDraw, padding: int) -> Tensor:
    """Flip, pad with zeros and crop 8-bit images, one after the other: the least work on a CPU."""
    height, width = images.shape[2:]
    moved = torch.zeros_like(images)
    offsets = zip(draw.flip.tolist(), draw.top.tolist(), draw.left.tolist(), strict=True)
    for source, target, (flip, top, left) in zip(images, moved, offsets, strict=True):
        mirrored = source.flip(-1) if flip else source
        rows, target_rows = _overlap(height, top - padding)
        columns, target_columns = _overlap(width, left - padding)
        target[:, target_rows, target_columns] = mirrored[:, rows, columns]
    return moved


def _overlap(size: int, begin: int) -> tuple[slice, slice]:
    """Where a crop of ``size`` that begins at ``begin`` sees the image, in image and in crop."""
    first, last = max(0, begin), max(0, size + min(0, begin))
    return slice(first, last), slice(max(0, -begin), max(0, size - max(0, begin)))


def _move_by_windows(images: Tensor, draw: AugmentationDraw, padding: int) -> Tensor:
    """Flip, pad and crop all 8-bit images at once: few launches, and no waiting, on a GPU."""
    images = torch.where(draw.flip[:, None, None, None], images.flip(-1), images)
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    # Views of every possible crop: (B, 3, 2p+1, 2p+1, H, W); one is taken of each image.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, draw.top, draw.left]


def _erase_by_slices(images: Tensor, box: Tensor, fill: Tensor) -> Tensor:
    """Fill rectangles in place, one image after the other: the least work on a CPU."""
    for image, (top, left, height, width) in zip(images, box.tolist(), strict=True):
        if height:
            image[:, top : top + height, left : left + width] = fill
    return images


def _erase_by_mask(images: Tensor, box: Tensor, fill: Tensor) -> Tensor:
    """Fill rectangles of the whole batch at once: few launches, and no waiting, on a GPU."""
    top, left, height, width = box[:, :, None].unbind(1)
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows = ((y >= top) & (y < top + height))[:, None, :, None]
    columns = ((x >= left) & (x < left + width))[:, None, None, :]
    return torch.where(rows & columns, fill, images)
