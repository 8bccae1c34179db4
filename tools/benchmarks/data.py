"""Speed of loading training batches, compared with the published pipeline.

Both pipelines return normalised raw and desensitized images of 256 x 128 from the same drawn JPEG
files. This project processes whole batches of decoded 8-bit images. The plain pipeline decodes and
processes one image after the other with Pillow, in as many worker processes as there are threads.
They run in turns, in separate processes; the best turn of each counts. FLOPs are those of
normalisation and noise.

Examples:
    python3 tools/benchmark.py data
    python3 tools/benchmark.py data --type blur --threads 2 --json data.json
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from configs.loading import load
from configs.published import STRENGTHS
from data.build import build_train_loader
from data.records import DatasetSplits, Sample
from tools.benchmarks.measuring import Work, add_measuring_arguments, contest
from tools.lib.command_line import whole_number
from utils.device import device_name, resolve_device, set_threads
from utils.memory import keep_freed_memory

_SMALL = (64, 128)  # width and height of Market-1501's files, px
_SHOTS = 8
_EPOCHS = {"cuda": 20}  # a GPU would take 30 ms for one epoch of the default size
# For each value of an image: divide by 255, subtract the mean, divide by the deviation; for noise:
# multiply by the deviation, add the value, round, clamp.
_NORMALISE_FLOPS, _NOISE_FLOPS = 3, 4
_ERASING_ATTEMPTS = 100


# The image files, and ``KEY VALUE ...`` of the configuration of both pipelines.
Given = tuple[tuple[str, ...], tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument("--type", choices=sorted(STRENGTHS), help="one desensitizer only")
    parser.add_argument(
        "--images", type=whole_number(1), default=1600, help="images to draw (1600)"
    )
    parser.add_argument(
        "--size", type=whole_number(1), nargs=2, default=(256, 128), help="height, width (px)"
    )
    parser.add_argument("--batch", type=whole_number(1), default=80, help="images in a batch (80)")
    parser.add_argument(
        "--cache", default="auto", choices=("auto", "device", "memory", "stream"),
        help="CACHE.MODE (auto)",
    )  # fmt: skip
    add_measuring_arguments(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    set_threads(arguments.threads)
    device, size = resolve_device(arguments.device), tuple(arguments.size)
    workers = arguments.threads or torch.get_num_threads()
    numbers: dict[str, Any] = {}
    print(
        f"data: {size[0]} x {size[1]}, batch {arguments.batch}, cache {arguments.cache}, on "
        f"{device_name(device)}, {workers} threads, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder), arguments.images)
        paths = tuple(sorted(str(path) for path in Path(folder).iterdir()))
        for kind in [arguments.type] if arguments.type else ["mosaic", "blur", "noise"]:
            values = {
                "MODEL.MODE": "C",
                "MODEL.DEVICE": device,
                "INPUT.TYPE": kind,
                "INPUT.RADIUS": STRENGTHS[kind],
                "INPUT.IMG_SIZE": size,
                "SOLVER.IMS_PER_BATCH": arguments.batch,
                "CACHE.MODE": arguments.cache,
                "DATALOADER.NUM_WORKERS": workers,
            }
            given = (paths, tuple(str(word) for pair in values.items() for word in pair))
            makers = {"plain": (make_plain, (given,)), "ours": (make_cached, (given,))}
            outcome = contest(arguments, torch.float32, image_flops(kind, size), makers)
            print(f"{kind}\n{outcome}")
            numbers[kind] = outcome.numbers
    return numbers


def image_flops(kind: str, size: Sequence[int]) -> float:
    """Return the floating-point operations of one raw and one desensitized image."""
    each = 2 * _NORMALISE_FLOPS + (_NOISE_FLOPS if kind == "noise" else 0)
    return float(each * 3 * size[0] * size[1])


def draw_images(folder: Path, count: int) -> None:
    """Write JPEG files of random images, of Market-1501's size."""
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(photo_like(rng, _SMALL)).save(folder / f"{number:05d}.jpg", quality=90)


def photo_like(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a smooth random image with grain, which compresses about as well as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (16, 8, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.normal(0, 3, smooth.shape).round().astype(np.int16)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def make_cached(given: Given) -> Work:
    """Build this project's loader; one turn is one epoch, on a GPU several."""
    keep_freed_memory()
    cfg = load(overrides=given[1])
    device = torch.device(cfg.MODEL.DEVICE)
    samples = [
        Sample(path, index // _SHOTS, 0, f"benchmark/train/{index // _SHOTS}")
        for index, path in enumerate(given[0])
    ]
    loader = build_train_loader(cfg, DatasetSplits("benchmark", train=tuple(samples)), device)
    epochs = _EPOCHS.get(device.type, 1)

    def work() -> int:
        return sum(len(batch) for _ in range(epochs) for batch in loader)

    return work


def make_plain(given: Given) -> Work:
    """Build the published pipeline; one turn is one epoch."""
    cfg = load(overrides=given[1])
    workers, device = cfg.DATALOADER.NUM_WORKERS, torch.device(cfg.MODEL.DEVICE)
    loader = DataLoader(
        PlainImages(given[0], cfg.INPUT), cfg.SOLVER.IMS_PER_BATCH, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip

    def work() -> int:
        return sum(len([images.to(device) for images in pair][0]) for pair in loader)

    return work


class PlainImages(Dataset):
    """Decodes, desensitizes, augments and normalises an image at each access."""

    def __init__(self, paths: Sequence[str], settings: CfgNode) -> None:
        self._paths, self._settings = paths, settings
        self._desensitize = PLAIN_DESENSITIZERS[settings.TYPE]
        self._mean, self._std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (settings.PIXEL_MEAN, settings.PIXEL_STD)
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the raw and the desensitized image, normalised (3, H, W)."""
        height, width = self._settings.IMG_SIZE
        with Image.open(self._paths[index]) as image:
            raw = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pair = [raw, self._desensitize(raw, self._settings.RADIUS)]
        if random.random() < 0.5:  # noqa: S311 - as published
            pair = [ImageOps.mirror(image) for image in pair]
        padding = self._settings.PADDING
        top, left = (random.randint(0, 2 * padding) for _ in range(2))  # noqa: S311
        box = (left, top, left + width, top + height)
        crops = [ImageOps.expand(image, padding).crop(box) for image in pair]
        arrays = (np.array(crop).transpose(2, 0, 1).astype(np.float32) / 255 for crop in crops)
        images = [(torch.from_numpy(array) - self._mean) / self._std for array in arrays]
        if random.random() < 0.5:  # noqa: S311
            self._erase(images)
        return images[0], images[1]

    def _erase(self, images: list[Tensor]) -> None:
        """Fill one rectangle with the mean, in both images."""
        height, width = self._settings.IMG_SIZE
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


def _mosaic(image: Image.Image, radius: float) -> Image.Image:
    pixels, tile = np.array(image), int(radius)
    for top in range(0, pixels.shape[0], tile):
        for left in range(0, pixels.shape[1], tile):
            pixels[top : top + tile, left : left + tile] = pixels[top, left]
    return Image.fromarray(pixels)


def _blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _noise(image: Image.Image, radius: float) -> Image.Image:
    values = np.asarray(image) / 255
    noisy = values + np.random.default_rng().normal(0.0, radius, values.shape)
    return Image.fromarray((noisy.clip(0, 1) * 255).round().astype(np.uint8))


PLAIN_DESENSITIZERS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "mosaic": _mosaic, "blur": _blur, "noise": _noise,
}  # fmt: skip
