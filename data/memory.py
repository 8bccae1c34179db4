"""Where decoded images are kept: on the GPU, in host memory, or nowhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import UserError

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
