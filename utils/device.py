"""Where networks are computed and in which precision: from a setting to torch's own types."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from utils.errors import UserError
from utils.logger import get_logger

PRECISIONS = ("auto", "float32", "bfloat16")
_AMPERE = (8, 0)  # first CUDA capability whose tensor cores multiply bfloat16


def resolve_device(name: str = "auto", device_id: str | int = "0") -> torch.device:
    """Return the device of a setting.

    Args:
        name: ``auto`` (a GPU if torch finds one), ``cpu``, ``cuda`` or ``cuda:N``.
        device_id: Number of the GPU that ``auto`` and ``cuda`` mean.

    Raises:
        UserError: Torch does not find the GPU, or the name is unknown.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    base, _, number = name.partition(":")
    if (
        base not in ("auto", "cuda")
        or (base == "auto" and number)
        or (number and not number.isdigit())
    ):
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if count == 0:
        raise UserError(
            f"device is {name!r} but {_why_no_cuda()}; expected a CUDA device, or choose cpu or "
            "auto"
        )
    index = int(number or device_id)
    if index >= count:
        raise UserError(
            f"device is cuda:{index} but torch finds {count} CUDA "
            f"device{'s' if count > 1 else ''}; expected a number from 0 to {count - 1}"
        )
    return torch.device("cuda", index)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch finds no CUDA device (is the driver installed and new enough?)"


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the number type in which networks are computed.

    Args:
        name: ``auto`` (bfloat16 if the hardware multiplies it faster than float32), ``float32`` or
            ``bfloat16``.
        device: Where the networks are computed.

    Returns:
        ``torch.float32`` or ``torch.bfloat16``. Without hardware for bfloat16 it is float32; if
        bfloat16 was chosen explicitly, a warning is logged.

    Raises:
        UserError: The name is unknown.
    """
    if name not in PRECISIONS:
        raise UserError(f"precision is {name!r}; expected one of {', '.join(PRECISIONS)}")
    if name == "auto":
        return torch.bfloat16 if gains_from_bfloat16(device) else torch.float32
    if name == "bfloat16":
        if has_bfloat16(device):
            return torch.bfloat16
        get_logger().warning("This %s has no native bfloat16; computing in float32", device.type)
    return torch.float32


def precision_name(precision: torch.dtype) -> str:
    """Return the name of a number type without ``torch.``, such as ``bfloat16``."""
    return str(precision).removeprefix("torch.")


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    if device.type != "cpu":
        return False
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) if flags else _bfloat16_by_torch()


def gains_from_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 ones.

    On Intel processors that takes AMX: AVX-512 BF16 alone has one unit, float32 has two. Networks
    are then 20 to 50 % slower in bfloat16 (Emerald Rapids without AMX; ResNet, U-Net,
    EfficientNet). On AMD processors AVX-512 BF16 is twice as fast as float32.
    """
    flags = _cpu_flags()
    if device.type == "cpu" and "GenuineIntel" in flags:
        return "amx_bf16" in flags
    return has_bfloat16(device)


def _cpu_flags() -> frozenset[str]:
    """Return the CPU's features and x86 vendor as Linux reports them; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    words: set[str] = set()
    for line in text.split("\n\n", 1)[0].splitlines():  # the first processor
        name, _, value = line.partition(":")
        if name.strip() in ("vendor_id", "flags", "Features"):  # x86, x86, ARM
            words.update(value.split())
    return frozenset(words)


def _bfloat16_by_torch() -> bool:
    """Return what torch's private checks report; they differ between releases."""
    cpu = getattr(torch, "cpu", None)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(cpu, name)()) for name in names if hasattr(cpu, name))


def device_name(device: torch.device) -> str:
    """Return the name of a device's hardware, for log lines and result files."""
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
    """Set the number of CPU threads of torch; 0 keeps torch's choice."""
    if count:
        torch.set_num_threads(count)
