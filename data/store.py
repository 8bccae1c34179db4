"""Decoded 8-bit images: where they are kept, and how batches of them are made.

Images are decoded once and kept on the GPU or in host memory (:class:`ResidentPixels`). If memory
is short, worker processes decode them for every batch (:class:`StreamedPixels`).
:func:`plan_cache` decides.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
            return CachePlan(target, both, _kept(num_images, need, room, target, both))
        if target == mode:
            raise UserError(
                f"mode {mode} needs {need / MIB:,.0f} MiB for {num_images} images, but "
                f"{min(room, free) / MIB:,.0f} MiB may be used; raise the limit, or use mode stream"
            )
    why = "as configured" if mode == "stream" else "more than may be used"
    return CachePlan(
        "stream",
        False,
        f"{num_images} images are streamed, {need / MIB:,.0f} MiB if they were kept: {why}",
    )


def _kept(num_images: int, need: int, room: int, target: str, both: bool) -> str:
    where = {"device": "on the GPU", "memory": "in host memory"}[target]
    what = "raw and desensitized" if both else "raw"
    total = need * (2 if both else 1)
    return (
        f"{num_images} images are kept {where} as 8-bit {what}: {total / MIB:,.0f} MiB of "
        f"{room / MIB:,.0f} that may be used"
    )


class PixelSource(Protocol):
    """Source of 8-bit images for the loaders.

    Attributes:
        usable: Indices of the images that can be decoded, int64, ascending.
    """

    usable: Tensor

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """Yield the images of each batch of indices in ``plan``."""


def decode(path: str | Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read and resize an image (:func:`data.images.resize`).

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImage: The file cannot be decoded completely.
    """
    return resize(read_rgb(path), size).transpose(2, 0, 1)


def count_workers(num_workers: int = -1) -> int:
    """Return the number of decoding threads or processes: as given, or one per core for -1."""
    if num_workers >= 0:
        return num_workers
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return min(16, len(cores) or os.cpu_count() or 1)


class ResidentPixels:
    """All images of a list, decoded and resized, in host or GPU memory.

    Args:
        paths: The files.
        size: Height and width, px.
        device: Where the images are kept.
        num_workers: Decoding threads (Pillow releases Python's lock); -1: one per core.
        skip_bad: Leave out images that cannot be decoded, instead of raising.
        pin_memory: Yield batches in page-locked memory, for asynchronous copies to a GPU.

    Raises:
        UserError: Images cannot be decoded, and ``skip_bad`` is False.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
        num_workers: int = -1,
        skip_bad: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self._pin_memory = pin_memory
        self.raw = torch.empty(len(paths), 3, *size, dtype=torch.uint8, device=device)
        self.desensitized: Tensor | None = None
        self.usable = _decode_all(paths, size, num_workers, skip_bad, keep_in=self.raw)

    @property
    def num_bytes(self) -> int:
        """Bytes that the images take."""
        kept = [self.raw] if self.desensitized is None else [self.raw, self.desensitized]
        return sum(images.numel() for images in kept)

    def keep_desensitized(self, desensitizer: Desensitizer) -> None:
        """Desensitize all images now and keep the result, in as much memory again."""
        if self.desensitized is not None:
            return
        desensitized = torch.empty_like(self.raw)
        with Progress(len(self.raw), "desensitizing images") as progress:
            for start in range(0, len(self.raw), _CHUNK):
                part = slice(start, start + _CHUNK)
                desensitized[part] = desensitizer(self.raw[part])
                progress.update(len(self.raw[part]))
        self.desensitized = desensitized

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """See :meth:`PixelSource.batches`."""
        for indices in plan:
            desensitized = self.desensitized
            yield (
                self._select(self.raw, indices),
                None if desensitized is None else self._select(desensitized, indices),
            )

    def _select(self, images: Tensor, indices: Tensor) -> Tensor:
        if not self._pin_memory:
            return images.index_select(0, indices.to(images.device, non_blocking=True))
        selected = torch.empty(len(indices), *images.shape[1:], dtype=torch.uint8, pin_memory=True)
        return torch.index_select(images, 0, indices, out=selected)


class StreamedPixels:
    """Images that worker processes decode for every batch, a few batches ahead.

    Workers send batches through pipes. Torch's way, shared memory, would wait forever when
    ``/dev/shm`` is full, and containers give it 64 MB by default.

    Args:
        paths: The files.
        size: Height and width, px.
        num_workers: Worker processes; -1: one per core; 0: decode in this process.
        skip_bad: Decode all images once, to find and leave out those that cannot be decoded.
        desensitizer: Applied by the workers; its result must depend on the image alone.
        pin_memory: Yield batches in page-locked memory, for asynchronous copies to a GPU.

    Raises:
        UserError: From :meth:`batches`: an image cannot be decoded, or a worker died.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        *,
        num_workers: int = -1,
        skip_bad: bool = False,
        desensitizer: Desensitizer | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._dataset = _BatchDataset(paths, size, desensitizer)
        self._num_workers, self._pin_memory = count_workers(num_workers), pin_memory
        self.usable = (
            _decode_all(paths, size, num_workers, skip_bad)
            if skip_bad
            else torch.arange(len(paths))
        )

    @property
    def num_bytes(self) -> int:
        """0: no images are kept."""
        return 0

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """See :meth:`PixelSource.batches`."""
        loader: DataLoader = DataLoader(
            self._dataset,
            sampler=[indices.tolist() for indices in plan],
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            timeout=_TIMEOUT_S if self._num_workers else 0,
        )
        try:
            for batch in loader:
                if isinstance(batch, str):
                    raise UserError(batch)
                raw, *desensitized = map(self._as_tensor, batch)
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

    def _as_tensor(self, images: NDArray[np.uint8]) -> Tensor:
        tensor = torch.from_numpy(images)
        return tensor.pin_memory() if self._pin_memory else tensor


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
    paths: Sequence[str],
    size: tuple[int, int],
    num_workers: int,
    skip_bad: bool,
    keep_in: Tensor | None = None,
) -> Tensor:
    """Decode all images in threads, into ``keep_in`` if given; return indices of good images."""
    bad: list[tuple[int, BadImage]] = []

    def decode_chunk(start: int) -> NDArray[np.uint8]:
        chunk = np.zeros((min(_CHUNK, len(paths) - start), 3, *size), dtype=np.uint8)
        for offset in range(len(chunk)):
            try:
                chunk[offset] = decode(paths[start + offset], size)
            except BadImage as error:
                bad.append((start + offset, error))
        return chunk

    starts = range(0, len(paths), _CHUNK)
    with (
        ThreadPoolExecutor(max(1, count_workers(num_workers))) as pool,
        Progress(len(paths), "decoding images") as progress,
    ):
        for start, chunk in zip(starts, pool.map(decode_chunk, starts), strict=True):
            if keep_in is not None:
                keep_in[start : start + len(chunk)] = torch.from_numpy(chunk)
            progress.update(len(chunk))
    bad.sort(key=lambda entry: entry[0])
    if bad:
        report_bad([error for _, error in bad], len(paths), skip_bad)
    good = torch.ones(len(paths), dtype=torch.bool)
    good[[index for index, _ in bad]] = False
    return good.nonzero().flatten()


def undecodable(paths: Sequence[str], num_workers: int = -1) -> list[BadImage]:
    """Decode all images in threads without keeping them; return the errors, in order."""

    def error_of(path: str) -> BadImage | None:
        try:
            read_rgb(path)
        except BadImage as error:
            return error
        return None

    errors = []
    with (
        ThreadPoolExecutor(max(1, count_workers(num_workers))) as pool,
        Progress(len(paths), "checking images") as progress,
    ):
        for error in pool.map(error_of, paths):
            if error is not None:
                errors.append(error)
            progress.update(1)
    return errors


def report_bad(errors: list[BadImage], total: int, skip_bad: bool) -> None:
    """Raise UserError, or log a warning if ``skip_bad``, for images that cannot be decoded."""
    named = "; ".join(f"{error.path} ({error.reason})" for error in errors[:_MAX_NAMED])
    more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
    text = f"{len(errors)} of {total} images cannot be decoded: {named}{more}"
    if not skip_bad:
        raise UserError(f"{text}; copy them again, or leave them out with CACHE.SKIP_BAD True")
    get_logger().warning("%s; left out (CACHE.SKIP_BAD)", text)
