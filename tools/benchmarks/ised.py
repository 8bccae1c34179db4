"""Speed of sealing and opening images, relative to saving a PNG with Pillow in the same run.

Examples:
    python3 tools/benchmark.py ised
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.vault.sealed_folder import publish
from modeling.encryption import png_format
from modeling.encryption.aead import AeadCipher, MemoryKeys
from modeling.encryption.sealed_image import Metadata, open_image, seal_image
from tools.benchmarks.data import photo_like
from tools.lib.command_line import number
from utils.logger import Progress

_METADATA = Metadata("0002/0002_c1_00.jpg", bytes(range(32)), 283, 96)
_SIZE = (128, 256)  # width and height, px


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "--seconds", type=number(0.01, 3600), default=1.0, help="time for each step (1.0)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # speeds are for one core
    try:
        return {"images_per_s": _print_speeds(arguments.seconds)}
    finally:
        torch.set_num_threads(threads)


def _print_speeds(seconds: float) -> dict[str, float]:
    """Print and return images per second on one core, also relative to Pillow."""
    pixels, keys = photo_like(np.random.default_rng(0), _SIZE), MemoryKeys()
    image = Image.fromarray(pixels)
    key = keys.sealing_key("benchmark/1")
    sealed = seal_image(key, pixels, _METADATA)
    content = png_format.encode(sealed)

    def seal_to_png() -> bytes:
        return png_format.encode(seal_image(key, pixels, _METADATA))

    def open_and_verify() -> None:
        read = png_format.decode(content)
        open_image(keys.opening_key(read.chunk), read)

    with tempfile.TemporaryDirectory() as folder:
        count = itertools.count()
        steps: dict[str, Callable[[], object]] = {
            "Pillow PNG save, in memory": lambda: image.save(io.BytesIO(), "PNG"),
            "seal": lambda: seal_image(key, pixels, _METADATA),
            "seal + PNG, in memory": seal_to_png,
            "seal + PNG + write + fsync": lambda: publish(
                Path(folder, f"{next(count)}.png"), seal_to_png(), overwrite=False
            ),
            "read + open + verify, in memory": open_and_verify,
        }
        rates = {
            name: _rate(steps[name], seconds)
            for name in Progress.over(steps, "Measure", unit="step")
        }
    rates |= _batch_rates(seconds)
    plain = rates["Pillow PNG save, in memory"]
    print("256 x 128 images, one core, best of 5:")
    for name, rate in rates.items():
        print(f"  {name:34} {rate:9.0f} /s  {rate / plain:6.1f} x Pillow")
    extra = len(content) - pixels.size
    print(f"  file: {len(content)} bytes, {extra} more than its pixels")
    return rates


def _batch_rates(seconds: float) -> dict[str, float]:
    """Return images per second of the aead cipher on batches of 64, rounding included."""
    cipher, subjects = AeadCipher(), [f"benchmark/{index % 16}" for index in range(64)]
    images = torch.rand(64, 3, 256, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sealed = cipher.seal(images, subjects)
    steps: dict[str, Callable[[], object]] = {
        "aead cipher, float batch -> sealed": lambda: cipher.seal(images, subjects),
        "aead cipher, sealed -> float batch": lambda: cipher.open(sealed, cipher.keys.opening_key),
    }
    return {name: 64 * _rate(step, seconds) for name, step in steps.items()}


def _rate(step: Callable[[], object], seconds: float) -> float:
    """Return calls per second: the best of five parts of the given time."""
    step()
    best = 0.0
    for _ in range(5):
        count, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < seconds / 5:
            step()
            count += 1
        best = max(best, count / passed)
    return best
