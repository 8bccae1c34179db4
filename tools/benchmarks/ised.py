"""Speed of sealing and opening images, relative to saving a PNG with Pillow in the same run.

With a trained checkpoint and images, it also measures `protect` relative to the anonymizer alone,
and the effect of rounding anonymized images to bytes on the recovered images.

Examples:
    python3 tools/benchmark.py ised
    python3 tools/benchmark.py ised --checkpoint log/run --photos datasets/market1501/query
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.api import Anonymizer
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from engine.vault.protect import ProtectOptions, protect_folder
from engine.vault.sealed_folder import publish
from engine.vault.sources import decode_source, list_sources
from engine.vault.subjects import subject_rule
from modeling.encryption import png_format
from modeling.encryption.aead import AeadCipher, MemoryKeys
from modeling.encryption.cipher import dequantize_pixels, quantize_pixels
from modeling.encryption.primitives import SubjectKey
from modeling.encryption.sealed_image import (
    Metadata,
    open_image,
    seal_image,
)
from tools.lib.command_line import number, whole_number
from utils.errors import UserError
from utils.logger import Progress

_METADATA = Metadata("0002/0002_c1_00.jpg", bytes(range(32)), 283, 96)
_BATCH = 32  # images of a batch of protect; the first batch, in which workers start, is not counted
_LEAST = _BATCH + 1  # images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "--seconds", type=number(0.01, 3600), default=1.0, help="time for each step (1.0)"
    )
    parser.add_argument("--checkpoint", type=Path, help="trained joint model (mode GCR)")
    parser.add_argument("--photos", type=Path, help="folder of images for --checkpoint")
    parser.add_argument(
        "--limit", type=whole_number(_LEAST), default=256, help="images at most (256)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument(
        "--workers", type=whole_number(0), default=2, help="processes of protect (2)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # speeds are for one core
    numbers: dict[str, Any] = {"images_per_s": _print_speeds(arguments.seconds)}
    numbers["ciphertext"] = _print_statistics()
    torch.set_num_threads(threads)
    if arguments.checkpoint is not None:
        if arguments.photos is None:
            raise UserError("--checkpoint needs --photos FOLDER")
        model = Anonymizer.from_checkpoint(arguments.checkpoint, device=arguments.device)
        numbers["protect_images_per_s"] = _print_protect(model, arguments)
        photos = _photos(model, arguments.photos, arguments.limit)
        numbers["recovered_psnr_db"] = _print_rounding(model, photos)
    return numbers


def photo_like() -> NDArray[np.uint8]:
    """Return a drawn 256 x 128 image that compresses about as well as a photograph."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 8, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((128, 256), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.normal(0, 3, smooth.shape).round().astype(np.int16)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def _print_speeds(seconds: float) -> dict[str, float]:
    """Print and return images per second on one core, also relative to Pillow."""
    pixels, keys = photo_like(), MemoryKeys()
    image = Image.fromarray(pixels)
    key = keys.sealing_key("benchmark/1")
    sealed = seal_image(key, pixels, _METADATA)
    content = png_format.encode(sealed)

    def seal_to_png() -> None:
        png_format.encode(seal_image(key, pixels, _METADATA))

    def open_and_verify() -> None:
        read = png_format.decode(content)
        open_image(keys.opening_key(read.chunk), read)

    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(10**9))
        steps: dict[str, Callable[[], object]] = {
            "Pillow PNG save, in memory": lambda: image.save(io.BytesIO(), "PNG"),
            "seal": lambda: seal_image(key, pixels, _METADATA),
            "seal + PNG, in memory": seal_to_png,
            "seal + PNG + write + fsync": lambda: _write(Path(folder), next(count), key, pixels),
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
    return {
        "aead cipher, float batch -> sealed": 64
        * _rate(lambda: cipher.seal(images, subjects), seconds),
        "aead cipher, sealed -> float batch": 64
        * _rate(lambda: cipher.open(sealed, cipher.keys), seconds),
    }


def _write(folder: Path, number: int, key: SubjectKey, pixels: NDArray[np.uint8]) -> None:
    """Seal one image to disk."""
    content = png_format.encode(seal_image(key, pixels, _METADATA))
    publish(folder / f"{number}.png", content, overwrite=False)


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


def _print_statistics(count: int = 200) -> dict[str, float]:
    """Print and return byte statistics of ciphertexts.

    They find coding errors, but do not prove security.
    """
    pixels, keys = photo_like(), MemoryKeys()
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    key = keys.sealing_key("benchmark/1")
    first, second = (
        np.stack([_ciphertext(key, image) for _ in range(count)]) for image in (pixels, changed)
    )
    expected = first[0].size / 256
    chi_square = [((np.bincount(c.ravel(), minlength=256) - expected) ** 2 / expected).sum()
                  for c in first]  # fmt: skip
    rows = first.astype(np.float64)
    adjacent = [abs(np.corrcoef(c[:, 1:].ravel(), c[:, :-1].ravel())[0, 1]) for c in rows]
    differ = first != second
    intensity = np.abs(first.astype(int) - second) / 255
    numbers = {
        "chi_square": float(np.mean(chi_square)),
        "largest_correlation": float(max(adjacent)),
        "npcr_percent": float(100 * differ.mean()),
        "uaci_percent": float(100 * intensity.mean()),
    }
    print(f"{count} ciphertexts (a check for coding errors, not evidence of security):")
    print(f"  chi-square {numbers['chi_square']:.1f} (255 expected), largest correlation of")
    print(f"  neighbours {numbers['largest_correlation']:.4f}, "
          f"NPCR {numbers['npcr_percent']:.2f} % (99.61 expected), "
          f"UACI {numbers['uaci_percent']:.2f} % (33.46 expected)")  # fmt: skip
    return numbers


def _ciphertext(key: SubjectKey, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the ciphertext of an image in the image's shape."""
    sealed = seal_image(key, pixels, _METADATA)
    return np.frombuffer(sealed.pixels, np.uint8).reshape(pixels.shape)


def _photos(model: Anonymizer, folder: Path, limit: int) -> torch.Tensor:
    """Return images at the networks' size, uint8 (B, H, W, 3)."""
    paths = list_sources(folder).images[:limit]
    if len(paths) < _LEAST:
        raise UserError(
            f"--photos {folder} contains {len(paths)} images; expected {_LEAST} or more"
        )
    sources = [decode_source((folder / path).read_bytes(), model.size) for path in paths]
    return torch.from_numpy(np.stack([source.pixels for source in sources]))


def _print_protect(model: Anonymizer, arguments: argparse.Namespace) -> dict[str, float]:
    """Print and return images per second of protect, and of the anonymizer alone."""
    photos = _photos(model, arguments.photos, arguments.limit)
    batches = photos.split(_BATCH)

    def anonymize() -> None:
        for batch in batches:
            model.anonymize_tensor(batch).cpu()

    before = _once(anonymize)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "photos/1").mkdir(parents=True)
        for path in list_sources(arguments.photos).images[: arguments.limit]:
            link = root / "photos/1" / path.replace("/", "_")
            link.symlink_to((arguments.photos / path).resolve())
        with Keyring.create(root / "keys.db", KeyFile(root / "master.key")) as keyring:
            options = ProtectOptions(
                "benchmark",
                subject_rule("folder", "benchmark"),
                workers=arguments.workers,
                index=False,
            )
            done: list[float] = []
            start = time.perf_counter()
            protect_folder(
                list_sources(root / "photos"), root / "sealed", model, keyring, options,
                report=lambda _: done.append(time.perf_counter()),
            )  # fmt: skip
    alone = len(photos) / min(before, _once(anonymize))
    print(f"protect of {len(done)} images, {arguments.workers} workers, {model.device}:")
    steady = (len(done) - _BATCH) / (done[-1] - done[_BATCH - 1])
    share = 100 * steady / alone
    print(f"  anonymizer alone {alone:.1f} /s, protect {steady:.1f} /s ({share:.0f} %)")
    print(f"  first batch after {done[_BATCH - 1] - start:.1f} s")
    return {"anonymizer alone": alone, "protect": steady}


def _once(step: Callable[[], object]) -> float:
    """Return the seconds of a second call, after the first has loaded everything."""
    step()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _print_rounding(model: Anonymizer, photos: torch.Tensor) -> dict[str, float]:
    """Print and return PSNR(raw, R(P)) for P unchanged and rounded to bytes."""
    squared = {"unchanged": 0.0, "bytes": 0.0}
    for batch in photos.split(_BATCH):
        raw = batch.permute(0, 3, 1, 2).double() / 255
        anonymized = model.anonymize_tensor(batch).cpu()
        for rounding in squared:
            rounded = dequantize_pixels(quantize_pixels(anonymized))
            given = anonymized if rounding == "unchanged" else rounded
            recovered = model.pixels.denormalize(model.recover_tensor(given)).cpu().double()
            squared[rounding] += float((recovered - raw).square().sum())
    print(f"recovery of {len(photos)} images from the anonymized image, PSNR to raw:")
    psnr_db = {
        rounding: float(-10 * np.log10(total / photos.numel()))
        for rounding, total in squared.items()
    }
    for rounding, value in psnr_db.items():
        print(f"  {rounding:24} {value:.3f} dB")
    return psnr_db
