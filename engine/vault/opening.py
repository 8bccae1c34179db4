"""Open sealed files again: write them as images, or verify a folder.

`unseal` opens files one by one. The other functions use its results: `write_opened` for the
commands open and recover, `verify_folder` and `accept_folder` for verify.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.images import MAX_PIXELS
from engine.api import Anonymizer
from engine.vault.index import check_segment, is_segment
from engine.vault.keyring import Keyring
from engine.vault.reading import (
    check_listed,
    check_original,
    header_of,
    read_image,
)
from engine.vault.sealed_folder import (
    MANIFEST_NAME,
    SEALED_SUFFIX,
    Manifest,
    listed_files,
    output_error,
    publish,
)
from layers.pixels import PixelSpace
from modeling.encryption.cipher import dequantize_pixels
from modeling.encryption.ised_errors import (
    BadInput,
    IsedError,
    StorageError,
    Tampered,
    UnsafePath,
    WrongKey,
)
from modeling.encryption.primitives import KeyOf
from modeling.encryption.sealed_image import Metadata, OpenedImage
from modeling.encryption.sealed_original import ORIGINAL_SUFFIX
from utils.files import (
    LOCK_NAME,
    MAX_LOCK_BYTES,
    WriteError,
    ensure_folder,
    locked_folder,
    remove_leftovers,
    sync_folder,
)
from utils.logger import Progress


@dataclass(frozen=True)
class OpenedFile:
    """The result of opening one file."""

    path: Path
    image: OpenedImage | None = None  # its content, or None after an error
    error: IsedError | None = None  # why it could not be opened or used
    digest: str = ""  # SHA-256 of the sealed file in hexadecimal
    header: bytes = b""  # its header chunk


class MissingManifest(IsedError):  # noqa: N818 - the same naming as in ised_errors
    """A sealed folder without a manifest: no protect run in it has ended."""


def sealed_files(path: Path) -> list[Path]:
    """Return the sealed files of a folder, sorted, or the one file.

    Raises:
        BadInput: The path does not exist, or the folder contains no sealed files.
    """
    if path.is_file():
        if path.suffix == ORIGINAL_SUFFIX:
            raise BadInput(f"{path} is a sealed source file; `protect reveal` opens it")
        return [path]
    if not path.is_dir():
        raise BadInput(f"{path} does not exist; expected a sealed file or a folder of them")
    files = files_in(path, SEALED_SUFFIX)
    if not files:
        raise _nothing_sealed(path)
    return files


def _nothing_sealed(folder: Path) -> BadInput:
    return BadInput(f"{folder} contains no sealed images (*{SEALED_SUFFIX})")


def files_in(folder: Path, suffix: str) -> list[Path]:
    """Return the entries of a folder with a suffix, sorted, without hidden ones."""
    shown = (path for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))
    return sorted(shown, key=attrgetter("name"))  # comparing 100,000 paths takes 1.5 s more


def listed_of(folder: Path, keyring: Keyring) -> Mapping[str, str] | None:
    """Return SHA-256 (hexadecimal) by name of the files that the manifest of a folder lists.

    Empty without a manifest. None for a folder of another keyring, whose manifest does not open; it
    may contain files under imported keys.

    Raises:
        BadInput: The manifest cannot be read.
        WrongKey, Tampered: The manifest was changed.
    """
    try:
        return listed_files(folder, keyring.manifest_key())
    except WrongKey:  # of another keyring, or its commitment was changed
        files = files_in(folder, SEALED_SUFFIX) + files_in(folder, ORIGINAL_SUFFIX)
        if any(_is_located(path, keyring) for path in files):
            raise
    return None


def checked_list(
    path: Path, keyring: Keyring, suffixes: Sequence[str], note: Callable[[str], None]
) -> tuple[Mapping[str, str], list[OpenedFile]]:
    """Return what `listed_of` returns for a folder, and the problems of the folder.

    Problems are a manifest that does not open, and listed files with one of the suffixes that are
    missing. Both results are empty for a single file, and without a manifest of this keyring that
    lists files; ``note`` is then called with a line.
    """
    if not path.is_dir():
        return {}, []
    try:
        listed = listed_of(path, keyring)
    except IsedError as error:
        return {}, [OpenedFile(path / MANIFEST_NAME, error=error.of_one_file())]
    if not listed:
        note(
            f"no manifest of this keyring lists files of {path}, so missing and replaced files "
            "cannot be detected"
        )
        return {}, []
    names = (name for name in listed if name.endswith(tuple(suffixes)))
    return listed, [_missing(path / x) for x in names if not os.path.lexists(path / x)]


def _is_located(path: Path, keyring: Keyring) -> bool:
    try:
        return keyring.locates(header_of(path))
    except IsedError as error:
        error.of_one_file()
        return False


def unseal(
    paths: Iterable[Path], key_of: KeyOf, listed: Mapping[str, str] | None = None
) -> Iterator[OpenedFile]:
    """Open images one after the other; a file that fails does not stop the others.

    A file also fails if another SHA-256 (hexadecimal) is listed for its name.

    Raises:
        KeyringError, StorageError: The keyring cannot be used any longer.
    """
    for path in paths:
        try:
            image, header, digest = read_image(path, key_of)
            check_listed(path, digest, listed or {})
        except IsedError as error:
            yield OpenedFile(path, error=error.of_one_file())
        else:
            yield OpenedFile(path, image, digest=digest, header=header)


# ---- open and recover: write images ----------------------------------------------------------


@dataclass(frozen=True)
class OpenOptions:
    """How opened images are converted."""

    pixels: PixelSpace  # pixel space of the networks that made them
    model: Anonymizer | None = None  # recovers them; None leaves them anonymized
    exact: bool = False  # write the stored bytes unchanged instead of converting them to colours
    batch: int = 32  # images per batch of the recovery network
    original_size: bool = False  # resize to the size of the source, if it is known


class OutputFolder:
    """Writes opened files below a folder, which is created if missing."""

    def __init__(self, root: Path, *, overwrite: bool = False) -> None:
        """Keep existing files, or replace them; the same content counts as written."""
        self.root, self._overwrite = root, overwrite
        self._swept: set[Path] = set()
        self._written: set[Path] = set()

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file under a relative path, readable by its owner only.

        An existing file with the same content is left unchanged.

        Raises:
            UnsafePath: A symbolic link leads out of the folder; nothing was created there.
            OutputExists: Another file has this name, or was written under it before.
            OutputBlocked: This name cannot be written; an example is a file in place of its folder.
            StorageError: The disk is full, read-only or failing.
        """
        path = self._created(name)
        if path.parent not in self._swept:  # a killed run may have left an opened image there
            self._swept.add(path.parent)
            remove_leftovers(path.parent)
        # a.jpg and a.jpg.png have the same output name; the second must not replace the first
        overwrite = self._overwrite and path not in self._written
        try:
            same_size = path.is_file() and path.stat().st_size == len(content)
            is_same = not overwrite and same_size and path.read_bytes() == content
        except OSError as error:
            raise output_error(path, error) from None
        if not is_same:
            publish(path, content, overwrite=overwrite)
            sync_folder(path.parent)
        self._written.add(path)

    def _created(self, name: str) -> Path:
        path = self.root / name
        try:
            if not path.parent.resolve().is_relative_to(self.root.resolve()):
                raise UnsafePath(f"{path} leads out of {self.root} through a symbolic link")
        except (OSError, RuntimeError):  # RuntimeError until Python 3.12
            raise UnsafePath(f"{path} leads into a loop of symbolic links") from None
        try:
            ensure_folder(self.root)
        except WriteError as error:
            raise StorageError(str(error)) from None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(path, error) from None
        return path


def write_opened(
    files: Iterable[OpenedFile], folder: OutputFolder, options: OpenOptions
) -> Iterator[OpenedFile]:
    """Write images as PNG files below a folder, under the paths of their sources.

    Yield every file, with an error if it was not written.

    Raises:
        StorageError: The disk is full, read-only or failing.
    """
    for file, pixels in _converted(files, options):
        if file.image is None or pixels is None:
            yield file
            continue
        metadata = file.image.metadata
        try:
            image = Image.fromarray(pixels)
            if options.original_size and metadata.orig_h and metadata.orig_w:
                image = _resized(image, (metadata.orig_w, metadata.orig_h))
            stream = io.BytesIO()
            image.save(stream, "PNG")
            folder.write(output_name(metadata, file.path), stream.getbuffer())
        except IsedError as error:
            yield replace(file, error=error.of_one_file())
        else:
            yield file


def _converted(
    files: Iterable[OpenedFile], options: OpenOptions
) -> Iterator[tuple[OpenedFile, NDArray[np.uint8] | None]]:
    """Yield each file with its pixels, uint8 (H, W, 3), or None for a file that did not open."""
    if options.model is not None:
        for block, images in in_batches(files, options.model, options.batch):
            if images is None:
                yield from ((file, None) for file in block)
            else:
                recovered = options.model.recover_tensor(images)
                yield from zip(block, options.model.to_pixels(recovered), strict=True)
        return
    for file in files:
        if file.image is None:
            yield file, None
        elif options.exact:
            yield file, file.image.pixels
        else:
            colours = options.pixels.to_uint8(to_images([file.image]))
            yield file, colours[0].permute(1, 2, 0).contiguous().numpy()


def output_name(metadata: Metadata, file: Path) -> str:
    """Return the path of the source of a sealed image, always with the suffix .png."""
    path = metadata.path or file.name
    return path if path.lower().endswith(".png") else f"{path}.png"


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    width, height = size
    if width * height > MAX_PIXELS:  # larger than any source: another program sealed it
        raise BadInput(
            f"original size {width} x {height}; at most {MAX_PIXELS} pixels, open it without "
            "--original-size"
        )
    return image.resize(size, Image.Resampling.BICUBIC)


# ---- verify -----------------------------------------------------------------------------------


def verify_folder(folder: Path, keyring: Keyring) -> Iterator[OpenedFile]:
    """Open every file of a folder and compare the folder with its manifest.

    Yields:
        Each entry of the folder except manifest, lock file and valid segments of the index, and
        each missing file. An entry has an error if it does not open, was replaced by another valid
        file, or is not in the manifest: a photograph, a hidden file, a subfolder, a link. A missing
        manifest is an error too.

    Raises:
        BadInput: It is not a folder, or contains neither sealed files nor a manifest.
        WrongKey, Tampered: The manifest was sealed under another keyring, or was changed.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; expected a folder of sealed images")
    manifest = Manifest.load(folder, keyring.manifest_key())
    listed = {} if manifest is None else manifest.files
    missing = set(listed)
    paths = sorted(path for path in folder.iterdir() if not _is_known(path))
    if not paths and manifest is None:
        raise _nothing_sealed(folder)
    if manifest is None:
        text = "no manifest, so missing files cannot be detected; run `protect` to its end"
        yield OpenedFile(folder / MANIFEST_NAME, error=MissingManifest(text))
    for path in Progress.over(paths, "Verify"):
        missing.discard(path.name)
        if path.is_symlink() or not path.is_file():
            kind = "a symbolic link" if path.is_symlink() else "not a regular file"
            yield OpenedFile(path, error=Tampered(f"is {kind}: it was put here from elsewhere"))
        elif is_segment(path.name):
            if error := check_segment(path, keyring):
                yield OpenedFile(path, error=error)
        elif path.name not in listed and manifest is not None:
            foreign = "is not in the manifest: it was put here from elsewhere, or a run did not end"
            yield OpenedFile(path, error=Tampered(foreign))
        elif path.suffix == ORIGINAL_SUFFIX:
            yield _verified_original(path, keyring, listed)
        else:
            yield from unseal([path], keyring.opening_key, listed)
    for name in sorted(missing):
        yield _missing(folder / name)


def _missing(path: Path) -> OpenedFile:
    return OpenedFile(path, error=Tampered("is in the manifest and missing here"))


def _verified_original(path: Path, keyring: Keyring, listed: Mapping[str, str]) -> OpenedFile:
    """Return the result of opening a sealed source file and comparing it with its image."""
    try:
        _, digest = check_original(path, keyring)
        check_listed(path, digest, listed)
    except IsedError as error:
        return OpenedFile(path, error=error.of_one_file())
    return OpenedFile(path, digest=digest)


def _is_known(path: Path) -> bool:
    """Return whether an entry is the manifest or the lock file of a run."""
    if path.name == LOCK_NAME:  # not a photograph under this name
        return path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_LOCK_BYTES
    return path.name == MANIFEST_NAME


def accept_folder(folder: Path, keyring: Keyring) -> int:
    """Write a new manifest of the files that can be opened now; return their number.

    For a folder that was changed on purpose, for example by deleting files of destroyed keys. It
    may be empty then.

    Raises:
        BadInput: It contains neither sealed files nor a manifest.
        FolderInUseError: `protect` or `index` runs in the folder.
    """
    key = keyring.manifest_key()
    with locked_folder(folder):
        manifest = Manifest.load(folder, key)
        images, originals = (files_in(folder, x) for x in (SEALED_SUFFIX, ORIGINAL_SUFFIX))
        if manifest is None and not images and not originals:
            raise _nothing_sealed(folder)
        opened = chain(
            unseal(Progress.over(images, "Accept"), keyring.opening_key),
            (
                _verified_original(path, keyring, {})
                for path in Progress.over(originals, "Accept originals")
            ),
        )
        files = {file.path.name: file.digest for file in opened if file.error is None}
        Manifest("" if manifest is None else manifest.dataset, files).save(folder, key)
    return len(files)


# ---- batches of opened files for the networks ----------------------------------------------------


def in_batches(
    files: Iterable[OpenedFile], model: Anonymizer, batch: int = 32
) -> Iterator[tuple[list[OpenedFile], Tensor | None]]:
    """Yield blocks of files with their images (B, 3, H, W); each unusable file comes alone."""
    block: list[OpenedFile] = []
    for file in (_checked_size(file, model) for file in files):
        if file.image is not None:
            block.append(file)
        if block and (file.image is None or len(block) == batch):
            yield block, _images_of(block)
            block = []
        if file.image is None:
            yield [file], None
    if block:
        yield block, _images_of(block)


def _checked_size(file: OpenedFile, model: Anonymizer) -> OpenedFile:
    """Return the file, with an error if its image does not have the size of the networks."""
    try:
        if file.image is not None:
            check_size(file.image, model)
    except BadInput as error:
        return OpenedFile(file.path, error=error)
    return file


def check_size(image: OpenedImage, model: Anonymizer) -> None:
    """Raise BadInput for an image that does not have the size of the networks."""
    height, width = image.pixels.shape[:2]
    if (height, width) != model.size:
        raise BadInput(
            f"{width} x {height} pixels; this checkpoint works on {model.size[1]} x "
            f"{model.size[0]}, use the one it was protected with"
        )


def _images_of(block: list[OpenedFile]) -> Tensor:
    return to_images([file.image for file in block if file.image])


def to_images(images: list[OpenedImage]) -> Tensor:
    """Return opened images of one size as normalised tensors (B, 3, H, W)."""
    return dequantize_pixels(torch.from_numpy(np.stack([image.pixels for image in images])))
