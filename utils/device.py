"""Keeping the C library from handing large tensors back to the system after every use.

Where and in which arithmetic to compute.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import torch

from utils.errors import UserError
from utils.logger import get_logger

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


_AMPERE = (8, 0)  # first CUDA capability whose tensor cores take bfloat16


def resolve_device(name: str = "auto", device_id: str | int = "0") -> torch.device:
    """Return the device that was asked for.

    Args:
        name: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        device_id: Which GPU ``auto`` and ``cuda`` mean.

    Raises:
        UserError: A GPU was asked for that torch does not see, or the name is none of the four.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if (
        kind not in ("auto", "cuda")
        or (kind == "auto" and number)
        or (number and not number.isdigit())
    ):
        raise UserError(f"MODEL.DEVICE is {name!r}; expected auto, cpu, cuda or cuda:N")
    if count == 0:
        raise UserError(
            f"MODEL.DEVICE is {name!r} but {_why_no_cuda()}; expected a CUDA device, or "
            "MODEL.DEVICE cpu or auto"
        )
    index = int(number or device_id)
    if index >= count:
        asked = f"MODEL.DEVICE is {name!r}" if number else f"MODEL.DEVICE_ID is {device_id!r}"
        raise UserError(
            f"{asked} but torch sees {count} CUDA device{'s' if count > 1 else ''}; expected a "
            f"number from 0 to {count - 1}"
        )
    return torch.device("cuda", index)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch sees no CUDA device (is the driver installed and new enough?)"


def precision_name(precision: torch.dtype) -> str:
    """Return a precision as RUNTIME.PRECISION calls it."""
    return str(precision).removeprefix("torch.")


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type of the networks' arithmetic.

    Args:
        name: ``auto`` (bfloat16 where the hardware computes in it, as emulating it is slower than
            float32), ``float32`` or ``bfloat16``.
        device: Where the networks run.

    Returns:
        ``torch.float32`` or ``torch.bfloat16``. bfloat16 that was asked for but is not there
        becomes float32, which one log line says.

    Raises:
        UserError: The name is none of the three.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"RUNTIME.PRECISION is {name!r}; expected one of auto, float32, bfloat16")
    if name != "float32" and has_bfloat16(device):
        return torch.bfloat16
    if name == "bfloat16":
        get_logger().warning(
            "RUNTIME.PRECISION bfloat16 is not native on this %s; computing in float32", device.type
        )
    return torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    if device.type != "cpu":
        return False
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) if flags else _torch_says_bfloat16()


def _cpu_flags() -> frozenset[str]:
    """Return what the kernel says the CPU can do; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            return frozenset(value.split())
    return frozenset()


def _torch_says_bfloat16() -> bool:
    """Ask torch, whose private checks come and go between releases."""
    cpu = getattr(torch, "cpu", None)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(cpu, name)()) for name in names if hasattr(cpu, name))


def device_name(device: torch.device) -> str:
    """Return the device's name for a log line or a table of results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def set_threads(count: int) -> None:
    """Let torch use ``count`` CPU threads; 0 leaves its own choice.

    Raises:
        UserError: A negative count.
    """
    if count < 0:
        raise UserError(f"RUNTIME.THREADS is {count}; expected 0 (torch's choice) or more")
    if count:
        torch.set_num_threads(count)
