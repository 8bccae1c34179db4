"""The published way to make training images: one picture after the other, with Pillow."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_ERASING_ATTEMPTS = 100


class PlainImages(Dataset):
    """Decodes, desensitizes, augments and normalises a picture each time it is asked for.

    Args:
        paths: The pictures.
        size: Height and width, px.
        desensitizer: ``mosaic``, ``blur`` or ``noise``.
        radius: Its strength.
        mean, std: Of the normalisation.
        padding: Zeros around the image before the crop, px.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        desensitizer: str,
        radius: float,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int,
    ) -> None:
        self._paths, self._size, self._radius, self._padding = list(paths), size, radius, padding
        self._desensitize = PLAIN_DESENSITIZERS[desensitizer]
        self._mean, self._std = (torch.tensor(one).view(3, 1, 1) for one in (mean, std))

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._paths)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        """Return the raw and the desensitized image, normalised (3, H, W)."""
        height, width = self._size
        with Image.open(self._paths[place]) as picture:
            raw = picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pair = [raw, self._desensitize(raw, self._radius)]
        if random.random() < 0.5:  # noqa: S311 - as published
            pair = [ImageOps.mirror(one) for one in pair]
        top, left = (random.randint(0, 2 * self._padding) for _ in range(2))  # noqa: S311
        box = (left, top, left + width, top + height)
        moved = [ImageOps.expand(one, self._padding).crop(box) for one in pair]
        images = [(_to_tensor(one) - self._mean) / self._std for one in moved]
        if random.random() < 0.5:  # noqa: S311
            self._erase(images)
        return images[0], images[1]

    def _erase(self, images: list[Tensor]) -> None:
        """Fill one rectangle with the mean, in both images."""
        height, width = self._size
        for _ in range(_ERASING_ATTEMPTS):
            area = random.uniform(0.02, 0.4) * height * width  # noqa: S311
            aspect = random.uniform(0.3, 3.3)  # noqa: S311
            rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if rows < height and columns < width:
                top = random.randint(0, height - rows)  # noqa: S311
                left = random.randint(0, width - columns)  # noqa: S311
                for image in images:
                    image[:, top : top + rows, left : left + columns] = self._mean
                return


def plain_batches(images: PlainImages, batch: int, num_workers: int) -> DataLoader:
    """Return a loader of shuffled batches, made by worker processes."""
    return DataLoader(
        images, batch, shuffle=True, drop_last=True, num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )  # fmt: skip


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1).astype(np.float32) / 255)


def _mosaic(picture: Image.Image, radius: float) -> Image.Image:
    pixels, tile = np.array(picture), int(radius)
    for top in range(0, pixels.shape[0], tile):
        for left in range(0, pixels.shape[1], tile):
            pixels[top : top + tile, left : left + tile] = pixels[top, left]
    return Image.fromarray(pixels)


def _blur(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def _noise(picture: Image.Image, radius: float) -> Image.Image:
    values = np.asarray(picture) / 255
    noisy = values + np.random.default_rng().normal(0.0, radius, values.shape)
    return Image.fromarray((noisy.clip(0, 1) * 255).round().astype(np.uint8))


PLAIN_DESENSITIZERS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "mosaic": _mosaic, "blur": _blur, "noise": _noise,
}  # fmt: skip
