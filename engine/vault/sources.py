"""Reading pictures that are to be protected: strictly, as what is lost here is lost for good."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from modeling.encryption.ised_errors import BadInput
from utils.files import check_regular

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
# By content, whatever the suffix says; not everything the library knows: for PostScript it would
# start an interpreter on somebody else's program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 1 << 28
_MAX_PIXELS = 1 << 26
_MAX_SIDE = 0xFFFF  # what the metadata holds
_GREY_OR_RGB = frozenset(("1", "L", "RGB"))
# What the image library lets out on damaged files, EXIF data above all; found by fuzzing.
_DECODER_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(ArithmeticError, AttributeError, LookupError, TypeError),
)


@dataclass(frozen=True)
class SourceImage:
    """A picture ready for the networks.

    Attributes:
        pixels: Resized, uint8 (H, W, 3).
        sha256: Of the file, 32 bytes.
        height, width: Of the upright picture before resizing.
        had_exif: Whether EXIF data was there; it is not kept.
    """

    pixels: NDArray[np.uint8]
    sha256: bytes
    height: int
    width: int
    had_exif: bool


def list_sources(root: Path) -> list[str]:
    """Return the relative paths of all pictures below a folder, sorted.

    Raises:
        BadInput: It is no folder, has none, or a folder below it cannot be read: its pictures would
            be left out without a word.
    """

    def refuse(error: OSError) -> None:
        raise BadInput(f"folder {error.filename} cannot be read ({error.strerror})")

    if not root.is_dir():
        raise BadInput(f"{root} is not a folder; expected a folder of pictures")
    found = [
        os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")  # noqa: PTH118
        for folder, _, names in os.walk(root, onerror=refuse)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122
    ]
    if not found:
        raise BadInput(f"{root} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    return sorted(found)


def other_files(root: Path) -> list[str]:
    """Return the files below a folder whose suffix is not one of a picture that is read, sorted."""
    files = (path for path in root.rglob("*") if path.is_file())
    others = (path for path in files if path.suffix.lower() not in SUFFIXES)
    return sorted(path.relative_to(root).as_posix() for path in others)


def read_bytes(path: Path) -> bytes:
    """Read a source file.

    Raises:
        BadInput: It cannot be read, is empty, or is absurdly long.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    if not content:
        raise BadInput("the file is empty")
    if len(content) > MAX_FILE_BYTES:
        raise BadInput(f"more than {MAX_FILE_BYTES >> 20} MiB, not a picture of a person")
    return content


def decode_source(content: bytes, size: tuple[int, int]) -> SourceImage:
    """Decode a file and resize it as in training.

    Args:
        content: The file.
        size: Height and width of the networks' images.

    Raises:
        BadInput: It is no picture, is damaged, or is not 8-bit RGB or grey without transparency.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            _check_kind(picture)
            had_exif = bool(picture.getexif())
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput(f"the file is not a picture in {', '.join(_FORMATS)}") from None
    except (*_DECODER_ERRORS, Image.DecompressionBombError) as error:
        raise BadInput(f"the picture is damaged ({error})") from None
    height, width = size
    resized = upright.resize((width, height), Image.Resampling.BILINEAR)
    return SourceImage(
        pixels=np.asarray(resized),
        sha256=hashlib.sha256(content).digest(),
        height=upright.height,
        width=upright.width,
        had_exif=had_exif,
    )


def _check_kind(picture: Image.Image) -> None:
    """Refuse what a silent conversion to RGB would change.

    Raises:
        BadInput: Names the mode.
    """
    if max(picture.size) > _MAX_SIDE or picture.width * picture.height > _MAX_PIXELS:
        raise BadInput(f"{picture.width} x {picture.height} pixels is too large")
    if any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ())):
        raise BadInput(
            f"picture mode {picture.mode} of 16 bit per channel; expected 8, convert it first"
        )
    num_pictures = getattr(picture, "n_frames", 1)
    if num_pictures > 1 and picture.format != "MPO":  # a camera's JPEG with a preview of itself
        raise BadInput(f"{num_pictures} pictures in one file; expected one, split it first")
    opaque_palette = picture.mode == "P" and "transparency" not in picture.info
    plain = picture.mode in _GREY_OR_RGB and "transparency" not in picture.info
    if not plain and not opaque_palette:
        mode = picture.mode + (" with transparency" if "transparency" in picture.info else "")
        raise BadInput(
            f"picture mode {mode}; expected 8-bit RGB or grey without transparency, "
            "convert it first"
        )
