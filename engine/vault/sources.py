"""Source images of a protect run: listing a folder, and decoding strictly.

Decoding is strict because whatever is lost here cannot be recovered from the sealed file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import signal
import stat
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
from modeling.encryption.sealed_original import MAX_CONTENT_BYTES
from utils.files import read_at_most

# The content decides, not the suffix. Not every format that Pillow reads: for PostScript it would
# start an interpreter on a program of unknown origin. GIF: comments take quadratic time.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MAX_SIDE = 0xFFFF  # the largest size that the metadata of a sealed file can hold
_PLAIN_MODES = frozenset(("1", "L", "RGB"))
_TIME_LIMIT_S = 10.0  # CPU time for one image; the largest allowed images take about 2 s
_MAX_HEADER_BYTES = 1 << 16
_MAX_CHUNKS = 1 << 16
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Fax compressions of TIFF: the decoder skips code words that it does not know.
_FAX = frozenset(("tiff_ccitt", "group3", "group4", "tiff_raw_16"))


@dataclass(frozen=True)
class SourceImage:
    """An image at the size of the networks."""

    pixels: NDArray[np.uint8]  # uint8 (H, W, 3)
    sha256: bytes  # SHA-256 of the file, 32 bytes
    # size after EXIF orientation, before resizing
    height: int
    width: int
    had_exif: bool  # the file has EXIF data, which is not kept


@dataclass(frozen=True)
class SourceFolder:
    """The entries below a folder, as sorted relative paths. Each entry is in exactly one field."""

    root: Path
    images: Sequence[str]  # files to read
    failed: Mapping[str, BadInput]  # entries that cannot be read, such as broken links; the reason
    left_out: Sequence[str]  # litter of operating systems, and files without an image suffix


def list_sources(root: Path, output: Path | None = None) -> SourceFolder:
    """Return the entries below a folder. Symbolic links to folders are followed.

    Every folder is read once: a link to a folder that is read under another path (a loop is an
    example) fails, because its images would get two subjects. The output folder is never read,
    although a link may lead to it.

    Raises:
        BadInput: It is not a folder, cannot be read, or contains no images.
    """
    if not root.is_dir():
        raise BadInput(f"{root} is not a folder; expected a folder of images")
    read_as: dict[tuple[int, int], str] = {}  # device and inode -> path
    if output is not None and output.is_dir():
        read_as[_identity(output)] = "the output folder"
    images: list[str] = []
    failed: dict[str, BadInput] = {}
    left_out: list[str] = []
    # Links come last, so that a folder is read under its own path, not under that of a link.
    folders, links = deque([("", False)]), deque[tuple[str, bool]]()
    while folders or links:
        folder, in_litter = (folders or links).popleft()
        try:
            entries = _entries(root / folder, "folder" if folder else f"folder {root}", read_as)
        except BadInput as error:
            if not folder:
                raise
            failed[folder] = error
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            litter = in_litter or is_litter(entry.name)
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append((path, litter))
                elif not litter and entry.is_symlink() and _is_folder(root / path):
                    links.append((path, litter))
                elif not litter and is_image_name(entry.name):
                    images.append(path)
                else:
                    left_out.append(path)
            except OSError as error:
                reason = f"symbolic link cannot be followed ({error.strerror}); restore its target"
                failed[path] = BadInput(reason)
    if not images and not failed:
        raise BadInput(f"{root} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return SourceFolder(root, sorted(images), dict(sorted(failed.items())), sorted(left_out))


def _entries(path: Path, name: str, read_as: dict[tuple[int, int], str]) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, unless it was read under another path."""
    try:
        first_path = read_as.setdefault(_identity(path), str(path))
        if first_path != str(path):
            raise BadInput(f"links to {first_path}, which is not read twice; remove this link")
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BadInput(f"{name} cannot be read ({error.strerror})") from None


def _is_folder(link: Path) -> bool:
    """Return whether a link leads to a folder; unlike `Path.is_dir`, fail if it is broken."""
    return stat.S_ISDIR(link.stat().st_mode)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def read_bytes(path: Path) -> bytes:
    """Return the content of a source file; raise BadInput if it is empty or cannot be read."""
    try:
        content = read_at_most(path, MAX_CONTENT_BYTES)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})") from None
    if content == b"":
        raise BadInput("the file is empty")
    if content is None:
        raise BadInput(f"more than {MAX_CONTENT_BYTES >> 20} MiB; not an image of a person")
    return content


def decode_source(content: bytes, size: tuple[int, int], name: str = "image") -> SourceImage:
    """Decode a file and resize it the same way as in training.

    Damage is detected as far as the format allows: by the checksums of PNG and of Deflate in TIFF,
    and by what the decoders of JPEG, WebP and TIFF report. BMP, PPM and uncompressed TIFF contain
    nothing that a changed pixel would contradict.

    The size is height and width of the networks' images; warnings contain the name.

    Raises:
        BadInput: It is not an image, is damaged, takes more than 10 s of CPU time, or is not 8-bit
            RGB or grey without transparency.
    """
    _check_structure(content)
    try:
        with _time_limit(_TIME_LIMIT_S), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_plain(image)
            image.load()
            had_exif = _has_exif(image)
            rotated = upright(image, name).convert("RGB")
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


def _check_structure(content: bytes) -> None:
    """Raise BadInput for damage and for sizes that the decoders do not check."""
    if content.startswith(_PNG_SIGNATURE):
        _check_png(content)
    elif content[:1] == b"P" and content[1:2] in b"123456":
        head = re.sub(rb"#[^\r\n]*", b"", content[:_MAX_HEADER_BYTES])
        if len(head.split(None, 4)) < (3 if content[1:2] in b"14" else 4):
            raise BadInput(f"the header of a PPM or PGM file has over {_MAX_HEADER_BYTES} bytes")


def _check_png(content: bytes) -> None:
    """Raise BadInput unless all chunks of a PNG file up to IEND are complete and undamaged.

    Pillow ignores damaged chunks that it does not need, and damage after the last row of pixels.
    """
    view, start = memoryview(content), len(_PNG_SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        name = bytes(view[start + 4 : start + 8])
        if end + 4 > len(content):
            raise BadInput(f"the image is damaged (the file ends in chunk {name!a} at {start})")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise BadInput(f"the image is damaged (wrong CRC of chunk {name!a} at byte {start})")
        if name == b"IEND":
            return
        start = end + 4
    raise BadInput(f"the PNG file has more than {_MAX_CHUNKS} chunks")


class _TookTooLongError(Exception):
    """Raised in a decoder by the timer of `_time_limit`."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise BadInput if the block takes more CPU time; without effect outside the main thread.

    Workers decode in their main threads. Only there can Python interrupt a decoder.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise _TookTooLongError

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again, if a decoder catches the first
    try:
        yield
    except _TookTooLongError:
        raise BadInput(f"decoding takes more than {seconds:g} s of CPU time") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


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
    # MPO is a camera's JPEG with its own preview. n_frames would read every image of a TIFF file.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadInput("several images in one file; expected one, split it first")
    if image.info.get("compression") in _FAX:
        raise BadInput("fax compression hides damage; save the image with another compression")
    transparent = "transparency" in image.info
    if (image.mode not in _PLAIN_MODES and image.mode != "P") or transparent:
        mode = image.mode + (" with transparency" if transparent else "")
        raise BadInput(
            f"image mode {mode}; expected 8-bit RGB or grey without transparency, convert it first"
        )
