"""Where decoded images are kept: on the GPU, in host memory, or nowhere.

Decoded 8-bit pictures: each file is decoded once and kept, or streamed if memory is short.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.desensitize import Desensitizer
from data.images import BadImage, read_rgb
from utils.errors import UserError
from utils.logger import get_logger
from utils.progress import Progress

MIB = 2**20
CACHE_MODES = ("auto", "device", "memory", "stream")

# Networks, gradients and activations need the rest of a GPU; a host has little else to keep.
_FREE_SHARE = {"device": 0.25, "memory": 0.5}
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CachePlan:
    """What was decided, and why.

    Attributes:
        mode: ``device``, ``memory`` or ``stream``.
        keep_desensitized: Whether desensitized images are kept too.
        reason: One line for the log.
    """

    mode: str
    keep_desensitized: bool
    reason: str


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

    ``auto`` takes the first of GPU, host memory and streaming where the images fit into the limit;
    without a limit into a quarter of the free memory of the GPU, or half of the host's.

    Args:
        num_images: Images to keep.
        size: Height and width, px.
        device: Where the images are used.
        mode: One of CACHE_MODES.
        limit_mib: Most memory for them, MiB; -1: by what is free.
        with_desensitized: Whether it pays to keep desensitized images too, if they fit.
        taken_bytes: What images of other lists already take of limit_mib.
        sharers: Processes on this machine, each of which keeps images of its own in host memory.

    Raises:
        UserError: If the mode is unknown, or was asked for and cannot hold the images.
    """
    if mode not in CACHE_MODES:
        raise UserError(f"CACHE.MODE is '{mode}'; expected one of {', '.join(CACHE_MODES)}")
    on_gpu = device.type != "cpu"
    if mode == "device" and not on_gpu:
        mode = "memory"  # on a CPU they are the same place
    need = num_images * 3 * size[0] * size[1]
    places = ["device", "memory"] if on_gpu else ["memory"]
    for place in places if mode == "auto" else [mode]:
        if place == "stream":
            break
        # Every process has a GPU of its own, but the host's memory is for all of them.
        on_host = place == "memory"
        free = _free_bytes(torch.device("cpu")) // sharers if on_host else _free_bytes(device)
        # A place that was asked for by name may be filled to the brim.
        share = 1.0 if place == mode else _FREE_SHARE[place]
        room = max(0, limit_mib * MIB - taken_bytes) if limit_mib >= 0 else int(free * share)
        if need <= min(room, free):
            both = with_desensitized and 2 * need <= min(room, int(free * _FREE_SHARE[place]))
            return CachePlan(place, both, _describe(num_images, need, room, place, both))
        if place == mode:
            raise UserError(
                f"CACHE.MODE {mode} needs {need / MIB:,.0f} MiB for {num_images} images, but "
                f"{min(room, free) / MIB:,.0f} MiB may be used; raise CACHE.LIMIT_MIB or set "
                "CACHE.MODE stream"
            )
    why = "as CACHE.MODE asks" if mode == "stream" else "more than may be used"
    return CachePlan(
        "stream",
        False,
        f"{num_images} images are streamed, {need / MIB:,.0f} MiB if they were kept: {why}",
    )


def _describe(num_images: int, need: int, room: int, place: str, both: bool) -> str:
    where = {"device": "on the GPU", "memory": "in host memory"}[place]
    what = "raw and desensitized" if both else "raw"
    total = need * (2 if both else 1)
    return (
        f"{num_images} images are kept {where} as 8-bit {what}: {total / MIB:,.0f} MiB of "
        f"{room / MIB:,.0f} that may be used"
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # What torch holds for later is free too: after a training that is most of the GPU.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = [_available_on_host(), _left_in_container()]
    return min(value for value in free if value is not None)


def _available_on_host() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_container() -> int | None:
    """Bytes left under a cgroup's limit; page cache counts as used, which errs on the safe side."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii")
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None


_CHUNK = 32  # pictures per task of the decoding threads, and per step of the desensitizer
_MAX_NAMED = 5

Pixels = tuple[Tensor, Tensor | None]  # raw, and desensitized where it is kept; uint8 (B, 3, H, W)


class PixelSource(Protocol):
    """Where loaders get 8-bit images from.

    Attributes:
        usable: Places of the pictures that can be decoded, int64, in order.
    """

    usable: Tensor

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """Yield raw images, and desensitized ones where they are at hand, for lists of places."""


def decode(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """Read a picture and resize it with Pillow's (antialiasing) bilinear filter on 8-bit values.

    Args:
        path: The file.
        size: Height and width, px.

    Returns:
        uint8 (3, H, W).

    Raises:
        BadImage: If the file is no whole picture.
    """
    height, width = size
    picture = read_rgb(path).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


def count_workers(num_workers: int = -1) -> int:
    """Return how many threads or processes decode: as asked, or one per core for -1."""
    if num_workers >= 0:
        return num_workers
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return min(16, len(cores) or os.cpu_count() or 1)


class ResidentPixels:
    """Keeps all pictures of a list, decoded and resized, in host or GPU memory.

    Args:
        paths: The pictures.
        size: Height and width, px.
        device: Where they are kept.
        num_workers: Decoding threads (Pillow decodes outside Python's lock); -1: one per core.
        skip_bad: Leave out pictures that cannot be decoded, instead of raising.
        pin_memory: Hand out batches where a GPU can fetch them while the host goes on.

    Raises:
        UserError: If pictures cannot be decoded and skip_bad is not set.
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
        """Desensitize all images now and keep the result: as much memory again, no work later."""
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
        for places in plan:
            kept = self.desensitized
            yield self._take(self.raw, places), None if kept is None else self._take(kept, places)

    def _take(self, images: Tensor, places: Tensor) -> Tensor:
        if not self._pin_memory:
            return images.index_select(0, places.to(images.device, non_blocking=True))
        taken = torch.empty(len(places), *images.shape[1:], dtype=torch.uint8, pin_memory=True)
        return torch.index_select(images, 0, places, out=taken)


class StreamedPixels:
    """Decodes pictures anew whenever they are asked for, in worker processes, a few batches ahead.

    Args:
        paths: The pictures.
        size: Height and width, px.
        num_workers: Worker processes; -1: one per core; 0: none.
        skip_bad: Decode everything once to find and leave out what cannot be decoded.
        desensitizer: One whose result depends on the image alone and which the workers shall apply.
        pin_memory: Put batches where a GPU can fetch them while the host goes on.

    Raises:
        UserError: From :meth:`batches`, if a picture cannot be decoded.
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
        self._pictures = _Pictures(paths, size, desensitizer)
        self._num_workers, self._pin_memory = count_workers(num_workers), pin_memory
        self.usable = (
            _decode_all(paths, size, num_workers, skip_bad)
            if skip_bad
            else torch.arange(len(paths))
        )

    @property
    def num_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    def batches(self, plan: Iterable[Tensor]) -> Iterator[Pixels]:
        """See :meth:`PixelSource.batches`."""
        loader: DataLoader = DataLoader(
            self._pictures,
            sampler=[places.tolist() for places in plan],
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch[0], batch[1] if len(batch) > 1 else None


class _Pictures(Dataset):
    """Batches of decoded pictures by places; a picture that is bad gives its sentence instead.

    An exception would reach the user as a worker's traceback.
    """

    def __init__(
        self, paths: Sequence[str], size: tuple[int, int], desensitizer: Desensitizer | None
    ) -> None:
        # One array instead of many strings: workers share its pages instead of copying them.
        self._paths = np.array(paths, dtype=np.str_)
        self._size, self._desensitizer = size, desensitizer

    def __getitem__(self, places: list[int]) -> tuple[Tensor, ...] | str:
        try:
            pictures = [decode(str(self._paths[place]), self._size) for place in places]
        except BadImage as error:
            return str(error)
        raw = torch.from_numpy(np.stack(pictures))
        return (raw, self._desensitizer(raw)) if self._desensitizer else (raw,)


def _as_it_is(batch: object) -> object:
    return batch


def _decode_all(
    paths: Sequence[str],
    size: tuple[int, int],
    num_workers: int,
    skip_bad: bool,
    keep_in: Tensor | None = None,
) -> Tensor:
    """Decode everything in threads, into ``keep_in`` if given; return places of good pictures."""
    bad: list[tuple[int, BadImage]] = []

    def decode_chunk(start: int) -> np.ndarray:
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
        _report_bad([error for _, error in bad], len(paths), skip_bad)
    good = torch.ones(len(paths), dtype=torch.bool)
    good[[place for place, _ in bad]] = False
    return good.nonzero().flatten()


def _report_bad(errors: list[BadImage], total: int, skip_bad: bool) -> None:
    named = "; ".join(f"{error.path} ({error.reason})" for error in errors[:_MAX_NAMED])
    more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
    text = f"{len(errors)} of {total} pictures cannot be decoded: {named}{more}"
    if not skip_bad:
        raise UserError(f"{text}; copy them again, or leave them out with CACHE.SKIP_BAD True")
    get_logger().warning("%s; left out (CACHE.SKIP_BAD)", text)
