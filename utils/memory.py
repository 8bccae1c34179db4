"""Memory: how much is free, whether work fits into it, reuse of freed blocks, and largest sizes."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.logger import get_logger

if TYPE_CHECKING:
    import torch

MIB = 2**20
WORTH_TELLING = 10**8  # similarities; smaller work takes so short that no estimate is logged
# Largest sizes that configuration files and checkpoints may ask for. A wrong or hostile file is
# rejected before memory is allocated.
MAX_IMAGE_SIDE = 4096  # px
MAX_CHANNELS = 1024  # of the first convolution of a U-Net or discriminator; published: 64
MAX_IDENTITIES = 200_000  # classes of a checkpoint; the largest public training set has under 5,000
# Down-samplings of a U-Net: its width doubles over the first levels and must reach its maximum, and
# 2 ** 10 px is the smallest image with 10.
NUM_DOWNS = (5, 10)

_CGROUP = Path("/sys/fs/cgroup")

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_TOP_PAD_BYTES = 64 * 2**20


def available_mib(device: torch.device) -> float:
    """Return the free memory of a device, MiB.

    On a GPU, memory that torch reserved but does not use counts as free: after a training that is
    most of the GPU. On the CPU it is the smaller of what the machine and the container have left.
    """
    if device.type == "cuda":
        import torch  # here: this module is also used without it

        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + unused) / MIB
    return min(_machine_mib(), _container_mib())


def _machine_mib() -> float:
    """Return MemAvailable; half of the memory on systems without /proc/meminfo."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / MIB


def _container_mib() -> float:
    """Return the cgroup's limit minus its usage; infinity without a limit.

    The inactive page cache counts as free: the kernel drops it when memory is needed.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return float("inf")
    if limit == "max":
        return float("inf")
    cached = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
    return max(0, int(limit) - used + cached) / MIB


def memory_budget_mib(device: torch.device) -> float:
    """Return the memory (MiB) that may be used: 90 % of the free memory."""
    return available_mib(device) * 0.9


def tell_memory(what: str, needed_mib: float, num_similarities: int) -> None:
    """Log the memory (MiB) that work needs, if the work is long enough to wait for."""
    if num_similarities >= WORTH_TELLING:
        get_logger().info("%s: about %s MiB besides the features", what, f"{needed_mib:,.0f}")


def require_memory(what: str, needed_mib: float, budget_mib: float, remedy: str) -> None:
    """Raise before work starts that needs more memory than there is."""
    if needed_mib > budget_mib:
        raise UserError(
            f"{what} needs about {needed_mib:,.0f} MiB of memory but {budget_mib:,.0f} MiB may be "
            f"used; {remedy}"
        )


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks for the next allocation instead of returning them to the kernel.

    By default glibc maps every block of 32 MiB or more separately and unmaps it when it is freed;
    the kernel fills each page with zeros on first use. A training step on a CPU allocates the same
    large tensors again and again and spends a fifth of its time on that (docs/PERFORMANCE.md). The
    peak memory stays the same.

    This changes the whole process, so scripts call it and the library (engine.api) does not. Return
    False on other systems and with other C libraries, where nothing changes.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another allocator is preloaded
        return False
    never = -1
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, never), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])
