"""Fusing networks with torch.compile, where that pays."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from utils.errors import UserError
from utils.logger import get_logger

_VOLTA = (7, 0)  # first CUDA capability that Triton, the GPU's compiler, writes kernels for


def resolve_compile(name: str, device: torch.device, *, worth_it: bool = True) -> bool:
    """Tell whether networks are to be compiled.

    Args:
        name: ``auto``, ``on`` or ``off``. ``auto`` compiles on GPUs only: on CPUs the convolutions
            take most of the time and stay what they are (docs/PERFORMANCE.md).
        device: Where the networks run.
        worth_it: Whether they run for long enough to gain what compiling costs; ``auto`` asks.

    Returns:
        Whether to. Where it was wanted and a compiler is missing, False, which one log line says.

    Raises:
        UserError: The name is none of the three.
    """
    if name not in ("auto", "on", "off"):
        raise UserError(f"RUNTIME.COMPILE is {name!r}; expected one of auto, on, off")
    if name == "off" or (name == "auto" and device.type != "cuda"):
        return False
    if name == "auto" and not worth_it:
        get_logger().info(
            "Networks are not compiled (RUNTIME.COMPILE auto): that takes minutes, and a training "
            "as short as this one would not gain them"
        )
        return False
    missing = _missing(device)
    if missing:
        get_logger().warning(
            "RUNTIME.COMPILE %s: %s; networks are not compiled, which costs speed alone",
            name, missing,
        )  # fmt: skip
    return not missing


def _missing(device: torch.device) -> str:
    """Say what compiling lacks; empty where nothing."""
    compilers = (
        os.environ.get("CXX", "g++"),
        os.environ.get("CC", "gcc"),
        "clang++",
        "clang",
        "cc",
    )
    if not any(shutil.which(name) for name in compilers):
        return "no C++ compiler is installed (looked for $CXX, g++ and clang++)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's C headers are not installed (python3-dev or the like has Python.h)"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if torch.cuda.get_device_capability(device) < _VOLTA:
            return "this GPU is older than Triton's oldest, capability 7.0"
    try:
        torch.compile(nn.Identity())
    except RuntimeError as error:  # this Python is too new for this torch
        return str(error).partition("\n")[0]
    return ""


def compile_in_place(networks: Iterable[nn.Module], *, forgiving: bool = False) -> None:
    """Let each network compile itself when it is first called; names and values stay.

    Shapes may vary: a second size makes a graph that holds for all further ones. Copies of a
    network are not compiled.

    Args:
        networks: Changed in place.
        forgiving: Run what the compiler fails on as it was written, with a warning of torch's.
    """
    if forgiving:
        import torch._dynamo  # noqa: PLC0415 - takes seconds

        torch._dynamo.config.suppress_errors = True
    # Float32 products stay float32 by choice (engine.model): advice to round them is no news.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    for network in networks:
        network.compile()


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled networks run as they were written.

    For passes so short or so varied in size that compiling would cost more than it gives. Before
    torch 2.6 there is no such switch, and they are compiled.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; loading it takes seconds
        return contextlib.nullcontext()
    set_stance = getattr(torch.compiler, "set_stance", None)
    return contextlib.nullcontext() if set_stance is None else set_stance("force_eager")
