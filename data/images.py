"""Read image files: which names are images, how a file becomes pixels, how pixels are resized.

The data sets, :mod:`engine.api` and :mod:`engine.vault.sources` share these functions, so that an
image has the same pixels in training, in the API and in ``protect``.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError
from utils.logger import get_logger

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_LITTER = frozenset(("__macosx", "@eadir", "thumbs.db", "desktop.ini"))

# A person crop has a few thousand pixels. More than this is a mistake or an attack on the memory.
MAX_PIXELS = 1 << 26

# What Pillow raises for damaged files, above all for damaged EXIF data; found by fuzzing.
DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
    # The decoders of AVIF, DDS, SPIDER and TIFF, which may be behind a .jpg suffix.
    RuntimeError, AttributeError, TypeError, LookupError, ArithmeticError,
)  # fmt: skip
_MAX_EXIF_WARNINGS = 5  # per process: a data set may have broken EXIF data in every image
_exif_warnings = 0


class BadImage(UserError):  # noqa: N818 - reads better than BadImageError
    """An image that cannot be decoded completely: its ``path``, and the ``reason``."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path = str(path)
        self.reason = reason
        super().__init__(
            f"{self.path}: {reason}; copy the file again, or leave it out with "
            "CACHE.SKIP_BAD True (--skip-bad)"
        )

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        """Rebuild from both arguments, so that worker processes can send the error."""
        return type(self), (self.path, self.reason)


def is_litter(name: str) -> bool:
    """Return whether a file or folder is a by-product of an operating system, or hidden.

    >>> is_litter("._a.jpg"), is_litter("__MACOSX"), is_litter("Thumbs.db"), is_litter("a.jpg")
    (True, True, True, False)
    """
    return name.startswith(".") or name.lower() in _LITTER


def is_image_name(name: str) -> bool:
    """Return whether a file name has the suffix of an image and is not litter."""
    return not is_litter(name) and PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, rotated by its EXIF orientation.

    Grey and palette images are converted. Transparency is dropped. 16-bit grey is divided by 256
    (Pillow would clip it to white), and float images are scaled if their values are in [0, 1].

    Returns:
        A decoded image of mode ``RGB``; the file is closed.

    Raises:
        BadImage: The file is missing, empty, not an image, truncated, damaged or too large.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(path, f"{image.width} x {image.height} pixels is too large")
            if image.format == "EPS":  # Pillow would run Ghostscript
                raise BadImage(path, "the file is PostScript, which is a program, not an image")
            image.load()
            return _to_rgb(upright(image, str(path)))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        with Path(path).open("rb") as stream:
            content = describe_content(stream.read(64)) or "not an image"
        raise BadImage(path, f"the file is {content}") from error
    except FileNotFoundError as error:
        raise BadImage(path, "no such file") from error
    except DECODER_ERRORS as error:
        raise BadImage(path, f"cannot be decoded ({error or type(error).__name__})") from error


def upright(image: Image.Image, name: str) -> Image.Image:
    """Rotate an image by its EXIF orientation; broken EXIF data is ignored with a warning.

    It must be decoded: errors of the decoder would be taken for errors of the EXIF data.
    """
    global _exif_warnings  # noqa: PLW0603 - one limit for all images of a process
    try:
        return ImageOps.exif_transpose(image)
    except DECODER_ERRORS as error:
        _exif_warnings += 1
        if _exif_warnings <= _MAX_EXIF_WARNINGS:
            get_logger().warning(
                "%s: the EXIF data is broken (%s); the image is read without its orientation%s",
                name,
                error or type(error).__name__,
                "; more such images are not reported" * (_exif_warnings == _MAX_EXIF_WARNINGS),
            )
        return image


def resize(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an RGB image as in training to uint8 (H, W, 3), by Pillow's bilinear filter.

    The filter is antialiasing and works on 8-bit values.
    """
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def describe_content(head: bytes) -> str | None:
    """Return ``empty``, ``a Git-LFS pointer ...`` or ``an HTML page`` for a file with these bytes.

    None for other content.
    """
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer (run `git lfs pull`)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML page"
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # otherwise some transparent palettes raise an error
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Scale the values of a grey image of more than 8 bits to 0..255."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    # Older versions of Pillow open a 16-bit PNG in mode I.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not is_16_bit and low >= 0 and high <= 255:
        return values.astype(np.uint8)
    if image.mode != "F" and low >= 0 and high < 1 << 16:
        return np.floor(values / 256).astype(np.uint8)
    raise ValueError(f"its values are from {low:g} to {high:g}; expected 0..255, or 0..1 as floats")
