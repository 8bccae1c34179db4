"""Decoded 8-bit images: where they are kept, and how batches of them are made.

Images are decoded once and kept on the GPU or in host memory (:class:`ResidentPixels`). If memory
is short, worker processes decode them for every batch (:class:`StreamedPixels`).
:func:`plan_cache` decides.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.desensitize import Desensitizer
from data.images import BadImage, read_rgb, resize
from utils.errors import UserError, WorkerError, worker_death, worker_died
from utils.logger import Progress, get_logger
from utils.memory import MIB, available_mib

CACHE_MODES = ("auto", "device", "memory", "stream")

# Networks, gradients and activations need the rest of a GPU. A host needs less for other things.
_FREE_SHARE = {"device": 0.25, "memory": 0.5}
_CHUNK = 32  # images per task of the decoding threads, and per step of the desensitizer
_MAX_NAMED = 5  # damaged files that a message names
_TIMEOUT_S = 600  # no batch of a few hundred images takes this long to decode

# Raw images, and desensitized images if they are kept; uint8 (B, 3, H, W).
Pixels = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class CachePlan:
    """Where the decoded images of a list are kept."""

    mode: str  # ``device``, ``memory`` or ``stream``
    keep_desensitized: bool  # whether desensitized images are kept too
    reason: str  # one line for the log


def plan_cache(
    num_images: int,
    size: tuple[int, int],
    device: torch.device,
    *,
    mode: str = "auto",
    limit_mib: int = -1,
    with_desensitized: bool = False,
    taken_bytes: int = 0,
    sharers: int = 1,
) -> CachePlan:
    """Decide where the decoded images of one list are kept.

    ``auto`` takes the first of GPU, host memory and streaming into whose limit the images fit.
    Without ``limit_mib`` the limit is a quarter of the free GPU memory, or half of the free host
    memory.

    Args:
        num_images: Images to keep.
        size: Height and width, px.
        device: Where the images are used.
        mode: One of CACHE_MODES.
        limit_mib: Memory limit of all lists together, MiB; -1: from the free memory.
        with_desensitized: Whether to keep desensitized images too, if they fit.
        taken_bytes: What images of other lists already take of ``limit_mib``.
        sharers: Processes on this machine; each keeps its own images in host memory.

    Raises:
        UserError: The mode is unknown, or the images do not fit where the mode puts them.
    """
    if mode not in CACHE_MODES:
        raise UserError(f"the mode is '{mode}'; expected one of {', '.join(CACHE_MODES)}")
    on_gpu = device.type != "cpu"
    if mode == "device" and not on_gpu:
        mode = "memory"  # the same memory on a CPU
    need = num_images * 3 * size[0] * size[1]
    candidates = ["device", "memory"] if on_gpu else ["memory"]
    for target in candidates if mode == "auto" else [mode]:
        if target == "stream":
            break
        # Every process has a GPU for itself. All processes of a machine share the host's memory.
        on_host = target == "memory"
        free = int(available_mib(torch.device("cpu") if on_host else device) * MIB)
        free //= sharers if on_host else 1
        # A mode that was chosen by name may use all free memory.
        share = 1.0 if target == mode else _FREE_SHARE[target]
        room = max(0, limit_mib * MIB - taken_bytes) if limit_mib >= 0 else int(free * share)
        if need <= min(room, free):
            both = with_desensitized and 2 * need <= min(room, int(free * _FREE_SHARE[target]))
            where = {"device": "on the GPU", "memory": "in host memory"}[target]
            what, total = ("raw and desensitized", 2 * need) if both else ("raw", need)
            text = (
                f"{num_images} images are kept {where} as 8-bit {what}: {total / MIB:,.0f} MiB of "
                f"{room / MIB:,.0f} that may be used"
            )
            return CachePlan(target, both, text)
        if target == mode:
            raise UserError(
                f"mode {mode} needs {need / MIB:,.0f} MiB for {num_images} images, but "
                f"{min(room, free) / MIB:,.0f} MiB may be used; raise the limit, or use mode stream"
            )
    why = "as configured" if mode == "stream" else "more than may be used"
    text = f"{num_images} images are streamed, {need / MIB:,.0f} MiB if they were kept: {why}"
    return CachePlan("stream", False, text)


@dataclass(eq=False)
class PixelSource(ABC):
    """Source of 8-bit images for the loaders."""

    paths: Sequence[str]  # the files
    size: tuple[int, int]  # height and width, px
    _: KW_ONLY
    num_workers: int = -1  # decoding threads or processes; -1: one per core
    skip_bad: bool = False  # leave out images that cannot be decoded, instead of raising
    pin_memory: bool = False  # yield batches in page-locked memory, for asynchronous copies to GPUs
    usable: Tensor = field(init=False)  # indices of the decodable images, int64, ascending
    num_bytes: int = field(init=False, default=0)  # bytes that the images take

    @abstractmethod
    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """Yield the images of each batch of indices in ``plan``."""


def decode(path: str | Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image, read and resized (`data.images`), uint8 (3, H, W); raise a `BadImage`."""
    return resize(read_rgb(path), size).transpose(2, 0, 1)


def count_workers(num_workers: int = -1) -> int:
    """Return the number of decoding threads or processes: as given, or one per core for -1."""
    if num_workers >= 0:
        return num_workers
    return min(16, len(os.sched_getaffinity(0)))


@dataclass(eq=False)
class ResidentPixels(PixelSource):
    """All images of a list, decoded and resized, in host or GPU memory.

    Images are decoded in threads: Pillow releases Python's lock.

    Raises:
        UserError: Images cannot be decoded, and ``skip_bad`` is False.
    """

    device: torch.device | str = field(default="cpu", kw_only=True)  # where the images are kept
    raw: Tensor = field(init=False)
    desensitized: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shape = (len(self.paths), 3, *self.size)
        self.raw = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self.num_bytes = self.raw.numel()
        errors = _decode_all(self.paths, self.size, self.num_workers, self.raw)
        self.usable = _usable(self.paths, errors, self.skip_bad)

    def keep_desensitized(self, desensitizer: Desensitizer) -> None:
        """Desensitize all images now and keep the result, in as much memory again."""
        desensitized = torch.empty_like(self.raw)
        with Progress(len(self.raw), "desensitizing images") as progress:
            for start in range(0, len(self.raw), _CHUNK):
                part = slice(start, start + _CHUNK)
                desensitized[part] = desensitizer(self.raw[part])
                progress.update(len(self.raw[part]))
        self.desensitized = desensitized
        self.num_bytes += desensitized.numel()

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """See :meth:`PixelSource.batches`."""
        for indices in plan:
            desensitized = self.desensitized
            yield (
                self._select(self.raw, indices),
                None if desensitized is None else self._select(desensitized, indices),
            )

    def _select(self, images: Tensor, indices: Tensor) -> Tensor:
        if not self.pin_memory:
            return images.index_select(0, indices.to(images.device, non_blocking=True))
        selected = torch.empty(len(indices), *images.shape[1:], dtype=torch.uint8, pin_memory=True)
        return torch.index_select(images, 0, indices, out=selected)


@dataclass(eq=False)
class StreamedPixels(PixelSource):
    """Images that worker processes decode for every batch, a few batches ahead.

    Workers send batches through pipes. Torch's way, shared memory, would wait forever when
    ``/dev/shm`` is full, and containers give it 64 MB by default. With 0 workers, this process
    decodes. With ``skip_bad``, all images are decoded once to find those to leave out.

    Raises:
        UserError: From :meth:`batches`: an image cannot be decoded, or a worker died.
    """

    # applied by the workers; its result must depend on the image alone
    desensitizer: Desensitizer | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._dataset = _BatchDataset(self.paths, self.size, self.desensitizer)
        errors = undecodable(self.paths, self.num_workers) if self.skip_bad else []
        self.usable = _usable(self.paths, errors, self.skip_bad)

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """See :meth:`PixelSource.batches`."""
        num_workers = count_workers(self.num_workers)
        loader: DataLoader = DataLoader(
            self._dataset,
            sampler=[indices.tolist() for indices in plan],
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_unchanged,
            timeout=_TIMEOUT_S if num_workers else 0,
            generator=torch.Generator(),  # draws nothing from the global one, as without a loader
        )
        try:
            for batch in loader:
                if isinstance(batch, str):
                    raise UserError(batch)
                tensors = map(torch.from_numpy, batch)
                raw, *desensitized = (t.pin_memory() if self.pin_memory else t for t in tensors)
                yield raw, desensitized[0] if desensitized else None
        except RuntimeError as error:
            if worker_died(error):
                raise WorkerError(worker_death("use fewer workers, or free memory")) from error
            if "timed out" in str(error):
                raise WorkerError(
                    f"the workers decoded no image for {_TIMEOUT_S} s; see whether the disk with "
                    "the images answers, or use fewer workers"
                ) from error
            raise
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise WorkerError(
                "worker processes cannot be started because /dev/shm is full; delete old files "
                "there, give a container more (docker run --shm-size 1g), or use 0 workers"
            ) from error


class _BatchDataset(Dataset):
    """Batches of decoded images by their indices; for a damaged image the text of its error.

    If ``__getitem__`` raised, the user would see the traceback of a worker.
    """

    def __init__(
        self, paths: Sequence[str], size: tuple[int, int], desensitizer: Desensitizer | None
    ) -> None:
        # Workers share the pages of one array; of many strings each worker would make a copy.
        self._paths = np.array(paths, dtype=np.str_)
        self._size, self._desensitizer = size, desensitizer

    def __getitem__(self, indices: list[int]) -> tuple[NDArray[np.uint8], ...] | str:
        try:
            raw = np.stack([decode(str(self._paths[index]), self._size) for index in indices])
        except BadImage as error:
            return str(error)
        if self._desensitizer is None:
            return (raw,)
        return raw, self._desensitizer(torch.from_numpy(raw)).numpy()


def _unchanged(batch: object) -> object:
    return batch


def _decode_all(
    paths: Sequence[str], size: tuple[int, int], num_workers: int, keep_in: Tensor
) -> list[BadImage]:
    """Decode all images in threads, into ``keep_in``; return the errors, in order."""

    def decode_chunk(start: int) -> tuple[NDArray[np.uint8], list[BadImage]]:
        chunk = np.zeros((min(_CHUNK, len(paths) - start), 3, *size), dtype=np.uint8)
        errors = []
        for offset in range(len(chunk)):
            try:
                chunk[offset] = decode(paths[start + offset], size)
            except BadImage as error:
                errors.append(error)
        return chunk, errors

    all_errors: list[BadImage] = []
    starts = range(0, len(paths), _CHUNK)
    with (
        ThreadPoolExecutor(max(1, count_workers(num_workers))) as pool,
        Progress(len(paths), "decoding images") as progress,
    ):
        for start, (chunk, errors) in zip(starts, pool.map(decode_chunk, starts), strict=True):
            keep_in[start : start + len(chunk)] = torch.from_numpy(chunk)
            all_errors += errors
            progress.update(len(chunk))
    return all_errors


def undecodable(paths: Sequence[str], num_workers: int = -1) -> list[BadImage]:
    """Decode all images in threads without keeping them; return the errors, in order."""

    def error_of(path: str) -> BadImage | None:
        try:
            read_rgb(path)
        except BadImage as error:
            return error
        return None

    with ThreadPoolExecutor(max(1, count_workers(num_workers))) as pool:
        counted = Progress.over(paths, "checking images")
        return [e for _, e in zip(counted, pool.map(error_of, paths), strict=True) if e is not None]


def _usable(paths: Sequence[str], errors: list[BadImage], skip_bad: bool) -> Tensor:
    """Return the indices of the images without an error; raise if one has, unless ``skip_bad``."""
    if errors:
        report_bad(errors, len(paths), skip_bad)
    bad = {error.path for error in errors}
    return torch.tensor([i for i, path in enumerate(paths) if path not in bad], dtype=torch.int64)


def report_bad(errors: list[BadImage], total: int, skip_bad: bool) -> None:
    """Raise UserError, or log a warning if ``skip_bad``, for images that cannot be decoded."""
    named = "; ".join(f"{error.path} ({error.reason})" for error in errors[:_MAX_NAMED])
    more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
    text = f"{len(errors)} of {total} images cannot be decoded: {named}{more}"
    if not skip_bad:
        raise UserError(f"{text}; copy them again, or leave them out with CACHE.SKIP_BAD True")
    get_logger().warning("%s; left out (CACHE.SKIP_BAD)", text)
