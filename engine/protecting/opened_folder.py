"""Write opened pictures, anonymized or recovered, as ordinary PNG files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.api import Anonymizer
from engine.protecting.sealed_folder import publish, storage_error
from engine.protecting.unsealing import Unsealed, in_batches, to_images
from layers.pixels import PixelSpace
from modeling.encryption.errors import IsedError, StorageError, UnsafePath
from modeling.encryption.metadata import Metadata
from modeling.encryption.secret_files import sync_folder
from utils.files import remove_leftovers

Rows = Iterator[tuple[Unsealed, NDArray[np.uint8] | None]]


@dataclass(frozen=True)
class OpenOptions:
    """What to make of an opened picture.

    Attributes:
        pixels: Pixel space of the networks it was made with.
        model: Recovers it; None leaves it anonymized.
        exact: Take the stored bytes as they are instead of turning them into colours.
        batch: Pictures per batch of the recovery network.
    """

    pixels: PixelSpace
    model: Anonymizer | None = None
    exact: bool = False
    batch: int = 32


def write_opened(
    files: Iterable[Unsealed],
    folder: Path,
    options: OpenOptions,
    *,
    original_size: bool = False,
    overwrite: bool = False,
) -> Iterator[Unsealed]:
    """Write pictures below a folder under the paths of their sources.

    Args:
        files: Opened files.
        folder: Made if need be.
        options: What to make of them.
        original_size: Resize to the size of the source, where it is known.
        overwrite: Replace what is there; otherwise only the very same content counts as done.

    Yields:
        Every file, with the error that kept it from being written.

    Raises:
        StorageError: The disk is full, read-only or failing.
    """
    swept: set[Path] = set()
    written: set[Path] = set()
    for file, pixels in _rendered(files, options):
        if file.picture is None or pixels is None:
            yield file
            continue
        metadata = file.picture.metadata
        picture = Image.fromarray(pixels)
        if original_size and metadata.orig_h and metadata.orig_w:
            size = (metadata.orig_w, metadata.orig_h)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        try:
            path = _place(folder, _name(metadata, file.path))
            if path.parent not in swept:  # a killed run may have left an opened picture there
                swept.add(path.parent)
                remove_leftovers(path.parent)
            # a.jpg and a.jpg.png are one name: the second must not take the first one's place
            _write(path, picture, overwrite=overwrite and path not in written)
            written.add(path)
        except StorageError:
            raise
        except IsedError as error:
            yield replace(file, error=error)
        else:
            yield file


def _rendered(files: Iterable[Unsealed], options: OpenOptions) -> Rows:
    """Yield each file with its pixels, uint8 (H, W, 3), None for files that did not open."""
    if options.model is not None:
        for block, images in in_batches(files, options.model, options.batch):
            if images is None:
                yield from ((file, None) for file in block)
            else:
                recovered = options.model.recover_tensor(images)
                yield from zip(block, options.model.to_pixels(recovered), strict=True)
        return
    for file in files:
        if file.picture is None:
            yield file, None
        elif options.exact:
            yield file, file.picture.pixels
        else:
            colours = options.pixels.to_uint8(to_images([file.picture], options.pixels))
            yield file, colours[0].permute(1, 2, 0).contiguous().numpy()


def _name(metadata: Metadata, file: Path) -> str:
    """Return the relative path to write to: the source's, always as PNG."""
    path = metadata.path or file.name
    return path if path.lower().endswith(".png") else f"{path}.png"


def _place(folder: Path, name: str) -> Path:
    """Return where to write, with its folder made.

    Raises:
        UnsafePath: A link in the folder leads out of it; nothing was made there.
        StorageError: The folder cannot be made.
    """
    path = folder / name
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise UnsafePath(f"{path} leads out of {folder} through a link")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path, error) from None
    return path


def _write(path: Path, picture: Image.Image, *, overwrite: bool) -> None:
    """Write one picture; what is there already with the same content is left as it is.

    Raises:
        OutputExists: Something else is there.
        StorageError: It cannot be written.
    """
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    content = stream.getvalue()
    if not overwrite and path.is_file() and path.read_bytes() == content:
        return
    publish(path, content, overwrite=overwrite)
    sync_folder(path.parent)
