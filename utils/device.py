"""Where and how networks are computed: device, number type, exact float32, compilation.

PyTorch may round float32 inputs to TF32 (GPUs) or bfloat16 (CPUs), and autocast computes in
bfloat16. `full_precision` and `exact_*` prevent one or the other. Scores, losses, pooling with
powers and normalisation statistics would lose digits; their inputs are small, so float32 costs
little. All settings but autocast's hold for the whole process: threads that enter and leave these
contexts at different times undo each other's settings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.logger import get_logger

PRECISIONS = ("auto", "float32", "bfloat16")
_VOLTA = (7, 0)  # oldest CUDA capability that Triton (torch's compiler for GPUs) supports
_AMPERE = (8, 0)  # first CUDA capability whose tensor cores multiply bfloat16


def resolve_device(name: str = "auto", device_id: str | int = "0") -> torch.device:
    """Return the device of a setting: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` is a GPU if torch finds one. ``device_id`` is the number of the GPU that ``auto`` and
    ``cuda`` mean.

    Raises:
        UserError: Torch does not find the GPU, or the name is unknown.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if not re.fullmatch("auto|cuda(:[0-9]*)?", name):
        raise UserError(f"device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if count == 0:
        why = "torch finds no CUDA device (is the driver installed and new enough?)"
        if torch.version.cuda is None:
            why = f"this torch ({torch.__version__}) is built without CUDA"
        raise UserError(
            f"device is {name!r} but {why}; expected a CUDA device, or choose cpu or auto"
        )
    index = int(name.partition(":")[2] or device_id)
    if index >= count:
        raise UserError(
            f"device is cuda:{index} but torch finds {count} CUDA "
            f"device{'s' if count > 1 else ''}; expected a number from 0 to {count - 1}"
        )
    return torch.device("cuda", index)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the number type in which networks are computed.

    ``auto`` is bfloat16 if the hardware multiplies it faster than float32. Without hardware for
    bfloat16 the type is float32; if bfloat16 was chosen explicitly, a warning is logged.

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
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


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
    info, names = _cpu_info(), ("vendor_id", "flags", "Features")  # of x86, x86 and ARM
    return frozenset(word for name in names for word in info.get(name, "").split())


def _cpu_info() -> dict[str, str]:
    """Return what Linux reports about the first processor; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def device_name(device: torch.device) -> str:
    """Return the name of a device's hardware, for log lines and result files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def set_threads(count: int) -> None:
    """Set the number of CPU threads of torch; 0 keeps torch's choice."""
    if count:
        torch.set_num_threads(count)


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``like``.

    It converts nothing: call ``.float()`` on inputs that may be bfloat16.
    """
    # Autocast knows no meta device (tensors without values, with which FLOPs are counted).
    device = "cpu" if like.is_meta else like.device.type
    return torch.autocast(device, enabled=False)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute matrix products in float32: no autocast, no TF32, no bfloat16 passes."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products in float32; the settings are restored."""
    backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    with _ieee([backend.matmul for backend in backends]):
        yield


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Compute float32 convolutions in float32; the settings are restored.

    By default cuDNN rounds their inputs to TF32 (10 bits).
    """
    # Not the common switch of cuDNN: reading it raises if its two settings differ.
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    with _ieee([cudnn.conv, cudnn.rnn, onednn.conv]):
        yield


@contextmanager
def _ieee(settings: Sequence[Any]) -> Iterator[None]:
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def resolve_compile(name: str, device: torch.device, *, worth_it: bool = True) -> bool:
    """Return whether networks are to be compiled; logs why not if they were expected to be.

    The name is ``auto``, ``on`` or ``off``. ``auto`` compiles on GPUs only: on CPUs convolutions
    take most of the time and compilation does not change them (docs/PERFORMANCE.md). It also needs
    networks that run long enough to gain more than compilation costs (``worth_it``).
    """
    if name == "off" or (name == "auto" and device.type != "cuda"):
        return False
    if name == "auto" and not worth_it:
        get_logger().info(
            "Networks are not compiled: that takes minutes, and a training as short as this one "
            "would not gain them"
        )
        return False
    missing = _missing(device)
    if missing:
        get_logger().warning("Networks are not compiled: %s; only speed is affected", missing)
    return not missing


def _missing(device: torch.device) -> str:
    """Return what compilation lacks on this machine; '' if nothing."""
    compilers = [os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc")]
    if not any(shutil.which(name) for name in (*compilers, "clang++", "clang", "cc")):
        return "no C++ compiler is installed (looked for $CXX, g++ and clang++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's C headers are not installed (Python.h, in a package such as python3-dev)"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if torch.cuda.get_device_capability(device) < _VOLTA:
            return "this GPU is older than capability 7.0, the oldest that Triton supports"
    try:
        torch.compile(nn.Identity())
    except RuntimeError as error:  # this Python is too new for this torch
        return str(error).partition("\n")[0]
    return ""


def compile_in_place(networks: Iterable[nn.Module], *, forgiving: bool = False) -> None:
    """Compile each network at its first call; parameter names and values stay.

    Input sizes may vary: a second size creates a graph that serves all further sizes. Copies of a
    network are not compiled. If compilation fails and ``forgiving`` is True, that part runs in
    eager mode, with a warning of torch.
    """
    if forgiving:
        import torch._dynamo  # noqa: PLC0415 - takes seconds

        torch._dynamo.config.suppress_errors = True
    # This project computes some products in float32 on purpose (utils.device).
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    for network in networks:
        network.compile()


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled networks run in eager mode.

    For passes that are so short, or vary so much in size, that compilation would cost more than it
    saves.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and loading it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
