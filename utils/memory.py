"""How much memory there is, and refusing in time what would not fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from utils.errors import UserError
from utils.logger import get_logger

MIB = 2**20
# Below this many similarities nobody waits: no estimate is printed.
WORTH_TELLING = 10**8
_CGROUP = Path("/sys/fs/cgroup")


def available_mib(device: torch.device) -> float:
    """Return the free memory of a device, MiB.

    On a GPU, memory that torch reserved but does not use counts as free: after a training that is
    most of the GPU. On the CPU it is the smaller of what the machine and the container have left.
    """
    if device.type == "cuda":
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


def memory_budget_mib(device: torch.device, limit_mib: float | None) -> float:
    """Return what may be used (MiB): the caller's limit, else nine tenths of what is free."""
    return available_mib(device) * 0.9 if limit_mib is None else limit_mib


def tell_memory(what: str, needed_mib: float, num_similarities: int) -> None:
    """Log how much memory work takes that is long enough to wait for."""
    if num_similarities >= WORTH_TELLING:
        get_logger().info("%s: about %s MiB besides the features", what, f"{needed_mib:,.0f}")


def require_memory(what: str, needed_mib: float, budget_mib: float, remedy: str) -> None:
    """Refuse work that would not fit, before any of it is done.

    Raises:
        UserError: ``needed_mib`` is above ``budget_mib``; it names both and the remedy.
    """
    if needed_mib > budget_mib:
        raise UserError(
            f"{what} needs about {needed_mib:,.0f} MiB of memory but {budget_mib:,.0f} MiB may be "
            f"used; {remedy}"
        )
