"""Training augmentation of batches; raw and desensitized images get the same augmentation."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.pixels import PixelSpace
from utils.errors import UserError

# Number of float images (0.4 MB each at 256 x 128) that fit into the second-level cache of a core.
_CPU_CHUNK = 4
_ERASING_AREA = (0.02, 0.4)
_ERASING_ASPECT = (0.3, 3.3)
_ERASING_ATTEMPTS = 100


@dataclass(frozen=True)
class AugmentationDraw:
    """Augmentation parameters of each image of a batch."""

    flip: Tensor  # whether the image is mirrored, bool (B,)
    top: Tensor  # corner of the crop in the padded image, px, int64 (B,)
    left: Tensor  # corner of the crop in the padded image, px, int64 (B,)
    # erased rectangle (top, left, height, width) in the cropped image, px, int64 (B, 4); height 0
    # erases nothing
    box: Tensor

    def __getitem__(self, part: slice) -> AugmentationDraw:
        """Return the parameters of a range of images."""
        return AugmentationDraw(self.flip[part], self.top[part], self.left[part], self.box[part])

    def to(self, device: torch.device) -> AugmentationDraw:
        """Move to a device, in one asynchronous copy."""
        if device == self.flip.device:
            return self
        columns = torch.stack([self.flip.long(), self.top, self.left, *self.box.unbind(1)])
        flip, top, left, *box = columns.to(device, non_blocking=True).unbind(0)
        return AugmentationDraw(flip.bool(), top, left, torch.stack(box, 1))


@dataclass(eq=False)
class Augmentation:
    """Flip, zero padding and random crop in 8 bits, then normalisation and random erasing.

    Random erasing (Zhong et al., 2017) fills a rectangle with the pixel mean in normalised space,
    as in the published method. Padding is black, because it precedes normalisation.
    """

    pixel_space: PixelSpace  # normalisation
    _: KW_ONLY
    flip_probability: float = 0.5  # of a mirror image, in [0, 1]
    padding: int = 10  # width of the zero padding on every side, px
    erase_probability: float = 0.5  # probability that a rectangle is erased, in [0, 1]

    def __post_init__(self) -> None:
        for name, value in (("flip", self.flip_probability), ("erasing", self.erase_probability)):
            if not 0.0 <= value <= 1.0:
                raise UserError(f"the {name} probability is {value}; expected 0 to 1")
        if self.padding < 0:
            raise UserError(f"the padding is {self.padding} pixels; expected 0 or more")

    def draw(
        self, count: int, size: tuple[int, int], generator: torch.Generator
    ) -> AugmentationDraw:
        """Draw the parameters of ``count`` images of a size (height and width, px).

        The generator is one of the CPU, so that the parameters are the same for every device.
        """
        uniform = torch.rand(count, 4, generator=generator)
        corners = uniform[:, 1:3].mul(2 * self.padding + 1).long().clamp_(max=2 * self.padding)
        box = _draw_boxes(count, size, generator)
        box[uniform[:, 3] >= self.erase_probability] = 0
        return AugmentationDraw(
            uniform[:, 0] < self.flip_probability, corners[:, 0], corners[:, 1], box
        )

    def __call__(self, images: Tensor, draw: AugmentationDraw) -> Tensor:
        """Augment and normalise uint8 (B, 3, H, W) to float32 of the same shape and device.

        The parameters are copied to the device of the images if necessary.
        """
        return self.normalize_and_erase(self.move(images, draw), draw)

    def move(self, images: Tensor, draw: AugmentationDraw) -> Tensor:
        """Flip, pad with zeros and crop uint8 images (B, 3, H, W); the size stays the same."""
        if images.device.type != "cpu":
            return _move_by_windows(images, draw.to(images.device), self.padding)
        return _move_by_slices(images, draw, self.padding)

    def normalize_and_erase(self, images: Tensor, draw: AugmentationDraw) -> Tensor:
        """Normalise uint8 images (B, 3, H, W) returned by :meth:`move`, and erase rectangles."""
        fill = self.pixel_space.mean_on(images.device)
        normalised = normalize_batch(images, self.pixel_space)
        if images.device.type != "cpu":
            return _erase_by_mask(normalised, draw.to(images.device).box, fill)
        return _erase_by_slices(normalised, draw.box, fill)


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
    """Draw a rectangle per image, int64 (B, 4); zeros if no attempt fits into the image.

    Area and aspect ratio (height over width) are uniform. As published, a rectangle as high or as
    wide as the image is drawn again.
    """
    height, width = size
    area, aspect = torch.rand(2, count, _ERASING_ATTEMPTS, generator=generator).unbind(0)
    area = (area * (_ERASING_AREA[1] - _ERASING_AREA[0]) + _ERASING_AREA[0]) * (height * width)
    aspect = aspect * (_ERASING_ASPECT[1] - _ERASING_ASPECT[0]) + _ERASING_ASPECT[0]
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < height) & (widths < width) & (heights > 0) & (widths > 0)
    accepted = fits.int().argmax(1, keepdim=True)
    extent = torch.cat([heights.gather(1, accepted), widths.gather(1, accepted)], 1)
    extent *= fits.any(1, keepdim=True)
    room = torch.tensor(size) - extent
    corner = (torch.rand(count, 2, generator=generator) * (room + 1)).long()
    return torch.cat([torch.minimum(corner, room), extent], 1)


def _move_by_slices(images: Tensor, draw: AugmentationDraw, padding: int) -> Tensor:
    """Flip, pad with zeros and crop 8-bit images one by one, which is fastest on a CPU."""
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
    """Return the part of the image that a crop at ``begin`` contains, in image and in crop."""
    start, stop = max(0, begin), max(0, size + min(0, begin))
    return slice(start, stop), slice(max(0, -begin), max(0, size - max(0, begin)))


def _move_by_windows(images: Tensor, draw: AugmentationDraw, padding: int) -> Tensor:
    """Flip, pad and crop all 8-bit images together: few kernels and no synchronisation on a GPU."""
    images = torch.where(draw.flip[:, None, None, None], images.flip(-1), images)
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4)
    # A view of all possible crops, (B, 3, 2p+1, 2p+1, H, W); indexing copies one crop per image.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, draw.top, draw.left]


def _erase_by_slices(images: Tensor, box: Tensor, fill: Tensor) -> Tensor:
    """Fill rectangles in place, image by image, which is fastest on a CPU."""
    for image, (top, left, height, width) in zip(images, box.tolist(), strict=True):
        if height:
            image[:, top : top + height, left : left + width] = fill
    return images


def _erase_by_mask(images: Tensor, box: Tensor, fill: Tensor) -> Tensor:
    """Fill the rectangles of all images together: few kernels, no synchronisation on a GPU."""
    top, left, height, width = box[:, :, None].unbind(1)
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows = ((y >= top) & (y < top + height))[:, None, :, None]
    columns = ((x >= left) & (x < left + width))[:, None, None, :]
    return torch.where(rows & columns, fill, images)
