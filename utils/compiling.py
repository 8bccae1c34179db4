"""Compilation of networks with torch.compile, where it saves time."""

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

from utils.logger import get_logger

_VOLTA = (7, 0)  # oldest CUDA capability that Triton (torch's compiler for GPUs) supports


def resolve_compile(name: str, device: torch.device, *, worth_it: bool = True) -> bool:
    """Return whether networks are to be compiled; logs why not if they were expected to be.

    Args:
        name: ``auto``, ``on`` or ``off``. ``auto`` compiles on GPUs only: on CPUs convolutions take
            most of the time and compilation does not change them (docs/PERFORMANCE.md).
        device: Where the networks run.
        worth_it: Whether they run long enough to gain more than compilation costs; ``auto`` only.
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
    network are not compiled.

    Args:
        networks: Changed in place.
        forgiving: If compilation fails, run that part in eager mode, with a warning of torch.
    """
    if forgiving:
        import torch._dynamo  # noqa: PLC0415 - takes seconds

        torch._dynamo.config.suppress_errors = True
    # This project computes some products in float32 on purpose (utils.precision).
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
