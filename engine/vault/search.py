"""Search a sealed folder by similarity: `load_gallery`, `most_similar`, `complete_index`.

Embeddings come from the index of the folder (`index`). Images without a vector are opened and
embedded. Nothing that was opened is written to the disk.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.api import Anonymizer
from engine.vault.index import (
    DIGEST_BYTES,
    KEY_ID_BYTES,
    MAX_VECTORS,
    IndexWriter,
    Segment,
    VectorKeys,
    embeddings,
    read_segments,
)
from engine.vault.keyring import Keyring
from engine.vault.opening import (
    MissingManifest,
    OpenedFile,
    check_size,
    in_batches,
    listed_of,
    sealed_files,
    to_images,
    unseal,
)
from engine.vault.sealed_folder import MANIFEST_NAME, Manifest
from engine.vault.sources import decode_source, read_bytes
from modeling.encryption import png_format
from modeling.encryption.ised_errors import (
    AuthenticationError,
    FormatError,
    IsedError,
    MissingKey,
    Tampered,
    UsageError,
)
from modeling.encryption.sealed_image import open_image
from utils.files import remove_leftovers, sync_folder
from utils.logger import Progress

# Rows that are converted to float32 at a time: 16 MiB for 2,048 dimensions.
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Match:
    """A search result."""

    file: Path
    path: str  # path of its source
    similarity: float  # cosine of the two embeddings


@dataclass(frozen=True)
class Query:
    """A query image."""

    path: Path
    kind: str  # `raw`, or `protected` for a sealed file
    vector: Tensor  # unit embedding, float32 (D,)


@dataclass
class Gallery:
    """The embeddings of a folder, in memory."""

    matrix: NDArray[np.float16]  # (N, D), filled row by row
    # SHA-256 in hexadecimal of the files by name, according to the manifest
    listed: Mapping[str, str]
    files: list[Path] = field(default_factory=list)  # sealed file of each row that is filled
    # files without an embedding, with the reason
    unusable: list[OpenedFile] = field(default_factory=list)

    @property
    def vectors(self) -> NDArray[np.float16]:
        """Unit embeddings, float16 (number of files, D)."""
        return self.matrix[: len(self.files)]

    def add(self, file: Path, vector: NDArray[np.float16]) -> None:
        """Fill the next row."""
        self.matrix[len(self.files)] = vector
        self.files.append(file)


@dataclass
class IndexSummary:
    """The counts of `complete_index`."""

    present: int = 0  # images that had a vector
    added: int = 0  # images whose vector was added
    failed: list[OpenedFile] = field(default_factory=list)  # images that cannot be opened
    interrupted: bool = False  # the run was asked to stop


def load_gallery(
    path: Path,
    keyring: Keyring,
    model: Anonymizer,
    dim: int,
    *,
    note: Callable[[str], None] = lambda _: None,
) -> Gallery:
    """Return the embeddings of a folder of sealed files, or of one sealed file.

    A vector of the index is used if the manifest lists its file with the same SHA-256 and the file
    exists. All other sealed files are opened and embedded.

    The model is that of the index, with embeddings of ``dim`` dimensions. ``note`` is called with a
    line about images that are opened.

    Raises:
        BadInput: The path does not exist, or contains no sealed files.
        UsageError: The index was made with another checkpoint.
        FormatError, AuthenticationError: Manifest or index are damaged or were changed.
    """
    files = sealed_files(path)
    segments: list[Segment] = []
    listed: Mapping[str, str] | None = {}
    if path.is_dir():
        listed = listed_of(path, keyring)
        if listed is not None:
            segments = _segments_of(path, keyring, model)
    gallery = Gallery(np.empty((len(files), dim), dtype="<f2"), listed or {})
    wanted = {
        bytes.fromhex(gallery.listed[file.name]): file
        for file in files
        if file.name in gallery.listed
    }
    _read_index(segments, wanted, keyring, gallery)
    done = {*gallery.files, *(file.path for file in gallery.unusable)}
    missing = [file for file in files if file not in done]
    if missing:
        if listed is None:
            note(f"{path} belongs to another keyring; opening all images")
        elif not segments and path.is_dir():
            note(f"{path} has no index; opening all images (`protect.py index` creates it)")
        elif segments:
            count = f"{len(missing)} of {len(files)} images"
            note(f"{path}: {count} have no vector; opening them (`protect.py index` adds vectors)")
        opened = unseal(Progress.over(missing, "Search"), keyring.opening_key, gallery.listed)
        for block, images in in_batches(opened, model):
            if images is None:
                gallery.unusable += block
            else:
                for file, vector in zip(block, embeddings(model, images), strict=True):
                    gallery.add(file.path, vector)
    return gallery


@torch.inference_mode()
def most_similar(
    vectors: NDArray[np.float16], queries: Tensor, count: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the highest cosines of each query and their rows, the most similar first.

    A row with NaN has the similarity -1. Vectors (N, D) and queries, float32 (Q, D), are unit
    embeddings.

    Returns:
        Similarities and rows, each (Q, min(count, N)).
    """
    values, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    queries = queries.float().cpu()
    buffer = torch.empty(min(_BLOCK_ROWS, len(vectors)), queries.shape[1])
    for start in range(0, len(vectors), _BLOCK_ROWS):
        part = torch.from_numpy(vectors[start : start + _BLOCK_ROWS])
        block = buffer[: len(part)].copy_(part)
        similarity = (queries @ block.T).nan_to_num_(-1.0).clamp_(-1.0, 1.0)  # float16 rounds
        best, indices = similarity.topk(min(count, len(part)))
        values = torch.cat([values, best], dim=1)
        rows = torch.cat([rows, indices + start], dim=1)
        values, order = values.topk(min(count, values.shape[1]))
        rows = rows.gather(1, order)
    return values.numpy(), rows.numpy()


def checked_matches(
    gallery: Gallery, similarities: Iterable[float], rows: Iterable[int], keyring: Keyring
) -> tuple[list[Match], list[OpenedFile]]:
    """Open the files of results, given as similarities and rows; return matches and failures."""
    matches, unusable = [], []
    for similarity, row in zip(similarities, rows, strict=True):
        path = gallery.files[row]
        (file,) = unseal([path], keyring.opening_key, gallery.listed)
        if file.image is None:
            unusable.append(file)
        else:
            matches.append(Match(file.path, file.image.metadata.path, similarity))
    return matches, unusable


def query_embedding(path: Path, keyring: Keyring, model: Anonymizer) -> Query:
    """Return a query with its embedding; it is an ordinary image or a sealed file.

    Raises:
        IsedError: It is neither sealed nor an ordinary image, its key cannot be used, or it does
            not have the size of the networks.
    """
    content = read_bytes(path)
    try:
        sealed = png_format.decode(content)
    except FormatError as error:
        if png_format.CHUNK_NAME in content[:64]:
            raise error
        source = decode_source(content, model.size)
        raw = torch.from_numpy(source.pixels.copy()).unsqueeze(0).permute(0, 3, 1, 2)
        return Query(path, "raw", model.embed_tensor(model.pixels.normalize(raw))[0].cpu())
    image = open_image(keyring.opening_key(sealed.chunk), sealed)
    check_size(image, model)
    return Query(path, "protected", model.embed_tensor(to_images([image]))[0].cpu())


def complete_index(
    folder: Path,
    files: Sequence[Path],
    keyring: Keyring,
    model: Anonymizer,
    *,
    batch: int = 32,
    progress: Callable[[int], object] = lambda _: None,
    stop: threading.Event | None = None,
) -> IndexSummary:
    """Add the missing vectors to the index of a sealed folder.

    Vectors of deleted and replaced files, of destroyed keys and of other checkpoints are removed.
    Small segments are merged. After any interruption, the same call continues; it also removes the
    unfinished file of a killed one.

    The caller holds the lock of the folder; ``files`` are its sealed files, see `sealed_files`.
    ``progress`` is called with numbers of images that are done. When ``stop`` is set, the batch
    under way is finished and no new one is started.

    Raises:
        MissingManifest: The folder has no manifest.
        WrongKey, Tampered, FormatError: Manifest or index was made under another keyring, was
            changed, or is damaged.
        StorageError: The index cannot be written; finished segments are complete.
    """
    summary = IndexSummary()
    manifest = Manifest.load(folder, keyring.manifest_key())
    if manifest is None:
        raise MissingManifest(f"{folder / MANIFEST_NAME} is missing; run `protect` to its end")
    remove_leftovers(folder)
    segments = read_segments(folder, keyring)
    missing = {
        bytes.fromhex(manifest.files[file.name]): file
        for file in files
        if file.name in manifest.files
    }
    listed, writer = len(missing), IndexWriter(folder, keyring, model.embedding_digest)
    old = _copy_usable(segments, missing, keyring, writer)
    summary.present = listed - len(missing)
    progress(summary.present)
    opened = unseal(missing.values(), keyring.opening_key, manifest.files)
    for block, images in in_batches(opened, model, batch):
        if images is not None:
            for file, vector in zip(block, embeddings(model, images), strict=True):
                row = keyring.row_of(file.header)
                if row is None:
                    raise MissingKey("the keyring was changed meanwhile; run the command again")
                writer.add(row.key_id, bytes.fromhex(file.digest), vector)
            summary.added += len(block)
        else:
            summary.failed += block
        progress(len(block))
        if stop is not None and stop.is_set():
            summary.interrupted = True
            break
    writer.flush()
    if old:
        for segment in old:
            segment.path.unlink(missing_ok=True)
        sync_folder(folder)
    with suppress(PermissionError):
        os.utime(folder, (0, 0))  # as for the manifest: copies keep the dates of folders
    return summary


def _segments_of(folder: Path, keyring: Keyring, model: Anonymizer) -> list[Segment]:
    segments, network = read_segments(folder, keyring), model.embedding_digest
    own = [segment for segment in segments if segment.network == network]
    if segments and not own:
        raise UsageError(
            f"the index of {folder} was made with another checkpoint (digest "
            f"{segments[0].network.hex()[:16]}, this one has {network.hex()[:16]}); give that "
            "checkpoint, or run `protect.py index` with this one"
        )
    return own


def _read_index(
    segments: Sequence[Segment], wanted: dict[bytes, Path], keyring: Keyring, gallery: Gallery
) -> None:
    """Open the vectors of the wanted files, by SHA-256; fill the gallery."""
    dim = gallery.matrix.shape[1]
    keys = VectorKeys(keyring)
    with Progress(sum(map(len, segments)), "Open the index", unit="vector") as bar:
        for segment in segments:
            if segment.dim != dim:
                raise Tampered(f"{segment.path} has {segment.dim} dimensions; expected {dim}")
            with suppress(FileNotFoundError):  # merged by `index` meanwhile: the images are opened
                for entry, ciphertext in segment.vectors():
                    bar.update()
                    file = wanted.pop(entry[:DIGEST_BYTES], None)
                    if file is None:  # deleted or replaced file, or its second vector
                        continue
                    try:
                        vector = keys.open(segment, entry, ciphertext)
                        gallery.add(file, np.frombuffer(vector, "<f2"))
                    except AuthenticationError:
                        raise
                    except IsedError as error:
                        gallery.unusable.append(OpenedFile(file, error=error))


def _copy_usable(
    segments: Iterable[Segment], missing: dict[bytes, Path], keyring: Keyring, writer: IndexWriter
) -> list[Segment]:
    """Copy the usable vectors of small and outdated segments; return those segments.

    Every file that has a usable vector is removed from ``missing``.
    """
    outdated, small = [], []
    for segment in sorted(segments, key=len, reverse=True):
        usable = [entry[:DIGEST_BYTES] for entry in segment.entries() if _is_usable(entry, keyring)]
        whole = len(missing.keys() & set(usable)) == len(segment)
        if segment.network != writer.network or not whole:
            outdated.append(segment)
        elif 2 * len(segment) < MAX_VECTORS:
            small.append(segment)
        else:
            for digest in usable:
                del missing[digest]
    if len(small) == 1 and not outdated:
        for entry in small.pop().entries():
            del missing[entry[:DIGEST_BYTES]]
    for segment in (*small, *outdated):
        if segment.network == writer.network:
            for entry, ciphertext in segment.vectors():
                if entry[:DIGEST_BYTES] in missing and _is_usable(entry, keyring):
                    writer.copy(entry, ciphertext)
                    del missing[entry[:DIGEST_BYTES]]
    return [*small, *outdated]


def _is_usable(entry: bytes, keyring: Keyring) -> bool:
    """Return whether the key of a vector is not destroyed."""
    row = keyring.row(entry[DIGEST_BYTES : DIGEST_BYTES + KEY_ID_BYTES])
    return row is None or row.state != "destroyed"
