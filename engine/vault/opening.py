"""Open sealed folders again: pictures one by one, whole folders against their manifest, search.

Write opened pictures, anonymized or recovered, as ordinary PNG files.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engine.api import Anonymizer
from engine.vault.keyring import Keyring
from engine.vault.sealed_folder import (
    MANIFEST_NAME,
    SEALED_SUFFIX,
    Manifest,
    publish,
    storage_error,
)
from engine.vault.secret_files import sync_folder
from engine.vault.sources import decode_source, read_bytes
from layers.pixels import PixelSpace
from modeling.encryption import png_format
from modeling.encryption.cipher import dequantize_pixels
from modeling.encryption.ised_errors import (
    BadInput,
    FormatError,
    IsedError,
    StorageError,
    Tampered,
    UnsafePath,
)
from modeling.encryption.keys import KeySource
from modeling.encryption.sealed_image import Metadata, OpenedImage, open_image
from utils.files import remove_leftovers


@dataclass(frozen=True)
class Unsealed:
    """One file after opening: a picture, or why there is none."""

    path: Path
    picture: OpenedImage | None = None
    error: IsedError | None = None
    digest: str = ""


@dataclass(frozen=True)
class Match:
    """One hit of a search: sealed file, path of its source, cosine similarity."""

    file: Path
    path: str
    similarity: float


def sealed_files(place: Path) -> list[Path]:
    """Return the sealed files of a folder, sorted, or the one file itself.

    Raises:
        BadInput: There is nothing.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise BadInput(f"{place} does not exist; expected a sealed file or a folder of them")
    found = _sealed_in(place)
    if not found:
        raise BadInput(f"{place} holds no sealed pictures (*{SEALED_SUFFIX})")
    return found


def _sealed_in(folder: Path) -> list[Path]:
    """Return the sealed files of a folder, sorted."""
    return sorted(p for p in folder.glob(f"*{SEALED_SUFFIX}") if not p.name.startswith("."))


def unseal(paths: Iterable[Path], keys: KeySource) -> Iterator[Unsealed]:
    """Open files one after the other; a bad one does not stop the rest.

    Raises:
        KeyringError, StorageError: The keyring cannot be used any more.
    """
    for path in paths:
        try:
            content = png_format.read_content(path)
            sealed = png_format.decode(content)
            picture = open_image(keys.opening_key(sealed.chunk), sealed)
        except OSError as error:
            reason = BadInput(f"cannot be read ({error.strerror})")
            yield Unsealed(path, error=reason)
        except IsedError as error:
            if error.stops:
                raise
            yield Unsealed(path, error=error)
        else:
            yield Unsealed(path, picture, digest=hashlib.sha256(content).hexdigest())


def to_images(pictures: list[OpenedImage]) -> Tensor:
    """Return opened images of one size as normalised images (B, 3, H, W)."""
    return dequantize_pixels(torch.from_numpy(np.stack([picture.pixels for picture in pictures])))


def in_batches(
    files: Iterable[Unsealed], model: Anonymizer, batch: int = 32
) -> Iterator[tuple[list[Unsealed], Tensor | None]]:
    """Yield opened files with their images; each file that cannot be used is yielded alone."""
    block: list[Unsealed] = []
    for file in (_fitting(file, model) for file in files):
        if file.picture is not None:
            block.append(file)
        if block and (file.picture is None or len(block) == batch):
            yield block, _images_of(block)
            block = []
        if file.picture is None:
            yield [file], None
    if block:
        yield block, _images_of(block)


def verify_folder(folder: Path, keyring: Keyring) -> Iterator[Unsealed]:
    """Open every file of a folder and compare the folder with its manifest.

    Yields:
        Each file, with an error if it does not open, was replaced by another valid file, is not in
        the manifest, or is missing; and the manifest itself if there is none.

    Raises:
        BadInput: It is no folder, or holds neither sealed pictures nor a manifest of any.
        WrongKey, Tampered: The manifest is another keyring's, or was changed.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; expected a folder of sealed pictures")
    manifest = Manifest.load(folder, keyring.manifest_key())
    listed = {} if manifest is None else dict(manifest.files)
    if manifest is None:
        reason = MissingManifest("no manifest: missing files cannot be noticed; end a protect run")
        yield Unsealed(folder / MANIFEST_NAME, error=reason)
    # An emptied folder lacks what its manifest names; only without one there is nothing to verify.
    for file in unseal(_sealed_in(folder) if listed else sealed_files(folder), keyring):
        expected = listed.pop(file.path.name, None)
        if file.error is None and manifest is not None and expected != file.digest:
            what = (
                "is not in the manifest: it was put here from elsewhere, or a run did not end"
                if expected is None
                else "is not the manifest's file of that name: it was put here from elsewhere"
            )
            foreign = Tampered(what)
            yield Unsealed(file.path, file.picture, foreign, file.digest)
        else:
            yield file
    for name in sorted(listed):
        yield Unsealed(folder / name, error=Tampered("is in the manifest and missing here"))


def accept_folder(folder: Path, keyring: Keyring) -> int:
    """Make a new manifest of the files that open now; return how many.

    For a folder that was changed on purpose, e.g. after files of destroyed keys were deleted.
    """
    manifest = Manifest.load(folder, keyring.manifest_key())
    opened = unseal(sealed_files(folder), keyring)
    files = {file.path.name: file.digest for file in opened if file.error is None}
    Manifest("" if manifest is None else manifest.dataset, files).save(
        folder, keyring.manifest_key()
    )
    return len(files)


class MissingManifest(IsedError):  # noqa: N818 - named like the other refusals
    """A folder whose protecting never ended."""


def search(
    query: Tensor, files: Iterable[Unsealed], model: Anonymizer, count: int
) -> tuple[list[Match], list[Unsealed]]:
    """Return the sealed pictures most like a query, and the files that could not be used.

    Args:
        query: Unit embedding (D,).
        files: Opened files.
        model: Embeds them.
        count: How many at most.
    """
    matches: list[Match] = []
    unusable = []
    for block, images in in_batches(files, model):
        if images is None:
            unusable += block
            continue
        similarities = model.embed_tensor(images) @ query.to(model.device)
        # A picture that the network fails on is the least alike: NaN would leave all in disorder.
        similarities = similarities.nan_to_num(-1.0)
        for file, similarity in zip(block, similarities.tolist(), strict=True):
            path = file.picture.metadata.path if file.picture else ""
            matches.append(Match(file.path, path, similarity))
        matches = sorted(matches, key=lambda match: -match.similarity)[:count]
    return matches, unusable


def query_embedding(path: Path, keys: KeySource, model: Anonymizer) -> Tensor:
    """Return the unit embedding (D,) of a query, a sealed file or an ordinary picture.

    Raises:
        IsedError: It is neither, or its key cannot be used.
    """
    content = read_bytes(path)
    try:
        sealed = png_format.decode(content)
    except FormatError as error:
        if png_format.CHUNK_NAME in content[:64]:
            raise error
        source = decode_source(content, model.size)
        raw = torch.from_numpy(source.pixels.copy()).unsqueeze(0).permute(0, 3, 1, 2)
        return model.embed_tensor(model.pixels.normalize(raw))[0]
    picture = open_image(keys.opening_key(sealed.chunk), sealed)
    return model.embed_tensor(to_images([picture]))[0]


def _images_of(block: list[Unsealed]) -> Tensor:
    """Return the images of opened files."""
    return to_images([file.picture for file in block if file.picture])


def _fitting(file: Unsealed, model: Anonymizer) -> Unsealed:
    """Turn a picture of another size than the networks' into an error."""
    if file.picture is None or file.picture.pixels.shape[:2] == model.size:
        return file
    height, width = file.picture.pixels.shape[:2]
    reason = BadInput(
        f"{width} x {height} pixels; this checkpoint works on {model.size[1]} x {model.size[0]}, "
        "use the one it was protected with"
    )
    return Unsealed(file.path, error=reason)


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
            colours = options.pixels.to_uint8(to_images([file.picture]))
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
