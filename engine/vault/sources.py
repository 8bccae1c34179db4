"""Source images of a protect run: listing a folder, and decoding strictly.

Decoding is strict because whatever is lost here cannot be recovered from the sealed file.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data.images import (
    DECODER_ERRORS,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    is_image_name,
    is_litter,
    resize,
    upright,
)
from modeling.encryption.ised_errors import BadInput
from utils.files import check_regular

MAX_FILE_BYTES = 1 << 28

# The content decides, not the suffix. Not every format that Pillow reads: for PostScript it would
# start an interpreter on a program that anybody may have written.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MAX_SIDE = 0xFFFF  # the largest size that the metadata of a sealed file can hold
_PLAIN_MODES = frozenset(("1", "L", "RGB"))


@dataclass(frozen=True)
class SourceImage:
    """An image at the size of the networks.

    Attributes:
        pixels: uint8 (H, W, 3).
        sha256: SHA-256 of the file, 32 bytes.
        height, width: Size after EXIF orientation, before resizing.
        had_exif: Whether the file has EXIF data, which is not kept.
    """

    pixels: NDArray[np.uint8]
    sha256: bytes
    height: int
    width: int
    had_exif: bool


def list_sources(root: Path) -> list[str]:
    """Return the sorted relative paths of all images below a folder.

    Raises:
        BadInput: It is not a folder, contains no images, or a folder below it cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise BadInput(f"folder {error.filename} cannot be read ({error.strerror})")

    if not root.is_dir():
        raise BadInput(f"{root} is not a folder; expected a folder of images")
    paths = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not is_litter(name)]
        paths += [
            os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")  # noqa: PTH118
            for name in names
            if is_image_name(name)
        ]
    if not paths:
        raise BadInput(f"{root} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(paths)


def other_files(root: Path) -> list[str]:
    """Return the sorted relative paths of files below a folder that `list_sources` leaves out."""
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in files
        if not is_image_name(path.name) or any(map(is_litter, path.parts[:-1]))
    )


def read_bytes(path: Path) -> bytes:
    """Return the content of a source file.

    Raises:
        BadInput: It cannot be read, is empty, or is longer than MAX_FILE_BYTES.
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
        raise BadInput(f"more than {MAX_FILE_BYTES >> 20} MiB; not an image of a person")
    return content


def decode_source(content: bytes, size: tuple[int, int]) -> SourceImage:
    """Decode a file and resize it the same way as in training.

    Args:
        content: The file.
        size: Height and width of the networks' images.

    Raises:
        BadInput: It is not an image, is damaged, or is not 8-bit RGB or grey without transparency.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_plain(image)
            image.load()
            had_exif = _has_exif(image)
            rotated = upright(image, "an image to be sealed").convert("RGB")
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput(f"the file is not an image in {', '.join(_FORMATS)}") from None
    except DECODER_ERRORS as error:
        raise BadInput(f"the image is damaged ({error})") from None
    return SourceImage(
        pixels=resize(rotated, size),
        sha256=hashlib.sha256(content).digest(),
        height=rotated.height,
        width=rotated.width,
        had_exif=had_exif,
    )


def _has_exif(image: Image.Image) -> bool:
    """Return whether an image has EXIF data, also if they are broken."""
    try:
        return bool(image.getexif())
    except DECODER_ERRORS:
        return True


def _check_plain(image: Image.Image) -> None:
    """Raise BadInput for images that the conversion to 8-bit RGB would change silently."""
    if max(image.size) > _MAX_SIDE or image.width * image.height > MAX_PIXELS:
        raise BadInput(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} in all")
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        raise BadInput(
            f"image mode {image.mode} with 16 bits per channel; expected 8, convert it first"
        )
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # MPO: a camera's JPEG that includes its own preview
        raise BadInput(f"{count} images in one file; expected one, split it first")
    transparent = "transparency" in image.info
    if (image.mode not in _PLAIN_MODES and image.mode != "P") or transparent:
        mode = image.mode + (" with transparency" if transparent else "")
        raise BadInput(
            f"image mode {mode}; expected 8-bit RGB or grey without transparency, convert it first"
        )
