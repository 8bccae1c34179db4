"""Reading pictures: the one place where a file becomes pixels, and a bad one gets its name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.errors import UserError

# A person crop is a few thousand pixels; this is a mistake or an attempt to fill the memory.
MAX_PIXELS = 64 * 1024 * 1024

# Pillow reports a broken stream through any of these, depending on format and version.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    # Formats that lie under a .jpg name unnoticed: AVIF, DDS, SPIDER, TIFF.
    RuntimeError,
    AttributeError,
    TypeError,
    LookupError,
    ArithmeticError,
)


class BadImage(UserError):  # noqa: N818 - the name that says it
    """A picture that cannot be decoded whole.

    Attributes:
        path: The file.
        reason: What is wrong with it, in words.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        """Name the file and what is wrong with it."""
        self.path = str(path)
        self.reason = reason
        super().__init__(
            f"{self.path}: {reason}; copy the file again, or leave it out with "
            "CACHE.SKIP_BAD True (--skip-bad)"
        )

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        """Rebuild from both arguments, so that the error survives the way out of a worker."""
        return type(self), (self.path, self.reason)


def read_rgb(path: str | Path) -> Image.Image:
    """Read one picture whole, as 8-bit RGB, turned as its EXIF orientation says.

    Grey and palette pictures are converted, transparency is dropped, and 16-bit grey is scaled
    (Pillow's own conversion would clip it to white).

    Args:
        path: The file.

    Returns:
        A decoded picture of mode ``RGB`` that no longer holds the file open.

    Raises:
        BadImage: The file is missing, empty, not a picture, truncated, damaged or absurdly large.
    """
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadImage(path, f"{picture.width} x {picture.height} pixels is too large")
            if picture.format == "EPS":  # Pillow would start Ghostscript on it
                raise BadImage(path, "the file is PostScript, which is a program, not a picture")
            picture.load()
            return _to_rgb(ImageOps.exif_transpose(picture))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(path, _not_a_picture(Path(path))) from error
    except FileNotFoundError as error:
        raise BadImage(path, "no such file") from error
    except _DECODER_ERRORS as error:
        raise BadImage(path, f"cannot be decoded ({error or type(error).__name__})") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture.copy()
    if picture.mode.startswith("I;16") or picture.mode == "I":
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # keeps a palette's transparency from becoming an error
    return picture.convert("RGB")


def _not_a_picture(path: Path) -> str:
    """Say what the file is instead, where its first bytes tell."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "the file is a Git-LFS pointer, not a picture (run `git lfs pull`)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "the file is an HTML page, not a picture"
    return "the file is not a picture"
