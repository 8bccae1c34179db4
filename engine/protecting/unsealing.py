"""Open sealed folders again: pictures one by one, whole folders against their manifest, search."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.api import Anonymizer
from engine.protecting.sealed_folder import MANIFEST_NAME, SEALED_SUFFIX, Manifest
from engine.protecting.source_images import decode_source, read_bytes
from layers.pixels import PixelSpace
from modeling.encryption import png_format
from modeling.encryption.errors import (
    BadInput,
    FormatError,
    IsedError,
    Tampered,
)
from modeling.encryption.keyring import Keyring
from modeling.encryption.keys import KeySource
from modeling.encryption.levels import PixelLevels
from modeling.encryption.picture import OpenedPicture, open_picture


@dataclass(frozen=True)
class Unsealed:
    """One file after opening: a picture, or why there is none."""

    path: Path
    picture: OpenedPicture | None = None
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
            picture = open_picture(keys.opening_key(sealed.chunk), sealed)
        except OSError as error:
            reason = BadInput(f"cannot be read ({error.strerror})")
            yield Unsealed(path, error=reason)
        except IsedError as error:
            if error.stops:
                raise
            yield Unsealed(path, error=error)
        else:
            yield Unsealed(path, picture, digest=hashlib.sha256(content).hexdigest())


def to_images(pictures: list[OpenedPicture], pixels: PixelSpace) -> Tensor:
    """Return opened pictures of one size and kind as normalised images (B, 3, H, W)."""
    levels = PixelLevels(pictures[0].kind, pixels.mean, pixels.std)
    stacked = np.stack([picture.pixels for picture in pictures])
    return levels.to_images(torch.from_numpy(stacked))


def in_batches(
    files: Iterable[Unsealed], model: Anonymizer, batch: int = 32
) -> Iterator[tuple[list[Unsealed], Tensor | None]]:
    """Yield opened files of one kind with their images; files that cannot be used come alone."""

    def kind(file: Unsealed) -> int:
        return -1 if file.picture is None else file.picture.kind

    for kind_of, group in groupby((_fitting(file, model) for file in files), key=kind):
        block: list[Unsealed] = []
        for file in group:
            if kind_of < 0:
                yield [file], None
                continue
            block.append(file)
            if len(block) == batch:
                yield block, _images_of(block, model)
                block = []
        if block:
            yield block, _images_of(block, model)


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
    picture = open_picture(keys.opening_key(sealed.chunk), sealed)
    return model.embed_tensor(to_images([picture], model.pixels))[0]


def _images_of(block: list[Unsealed], model: Anonymizer) -> Tensor:
    """Return the images of opened files."""
    return to_images([file.picture for file in block if file.picture], model.pixels)


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
