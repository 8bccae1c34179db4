"""What a result was made with: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from utils.device import device_name

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torchvision", "numpy", "pillow", "cryptography")


def environment_report(device: torch.device | None = None) -> dict[str, str]:
    """Return versions of what can move a number, the commit, and the machine.

    Args:
        device: Where the result was computed; None for the CPU.

    Returns:
        Names to texts, for ``results.json`` and the log. Neither host nor user names are in it:
        result files get published.
    """
    device = device or torch.device("cpu")
    report = {
        "secure-reid": _version("secure-reid") or "not installed",
        "git": git_revision() or "unknown",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "platform": platform.platform(terse=True),
        "device": f"{device.type}: {device_name(device)}",
        "cpus": str(_num_cpus()),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        report["cuda"] = str(torch.version.cuda)
        report["cudnn"] = str(torch.backends.cudnn.version())
    return report


def _num_cpus() -> int:
    """Return the CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision(folder: str | Path = _ROOT) -> str | None:
    """Return the commit of a checkout, with ``-dirty`` where files differ from it.

    Returns:
        None where ``folder`` is not the top of a checkout, or git is not there; a project that lies
        inside another repository must not take that one's commit for its own.
    """
    folder = Path(folder).resolve()
    top = _git(folder, "rev-parse", "--show-toplevel")
    revision = _git(folder, "rev-parse", "HEAD")
    if not top or not revision or Path(top).resolve() != folder:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}-dirty" if changed else revision


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        # No index refresh is written: reporting must not touch the checkout or wait for its lock.
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
