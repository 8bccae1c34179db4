"""Keeping the C library from handing large tensors back to the system after every use."""

from __future__ import annotations

import ctypes
import platform
import sys

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let freed memory be used again without a trip to the system, where glibc allows it.

    glibc maps every block of 32 MiB or more afresh and unmaps it when it is freed, and the system
    fills each page with zeros on first use. A training step on the CPU allocates the same large
    tensors again and again, so it spends a fifth of its time on pages (docs/PERFORMANCE.md). With
    this, blocks come from the heap, which keeps what was freed; the peak stays what it was.

    It acts on the whole process, so programs call it, and the library (engine.api) does not.

    Returns:
        Whether it took effect: False off Linux and with other C libraries, where nothing changes.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another allocator was preloaded, which has its own ways
        return False
    settings = (
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, -1),  # never
        (_M_TOP_PAD, _TOP_PAD_BYTES),
    )
    return all([mallopt(name, value) == 1 for name, value in settings])
