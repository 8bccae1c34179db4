"""Versions, commit and machine that a result was made with."""

from __future__ import annotations

import functools
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
    """Return the versions of packages that can change a number, the commit, and the machine.

    The device is where the result was computed; None for the CPU. The texts contain neither host
    nor user names, since result files are published.
    """
    device = device or torch.device("cpu")
    report = {
        "secure-reid": _version("secure-reid") or "not installed",
        "git": git_revision() or "unknown",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        "platform": platform.platform(terse=True),
        "device": f"{device.type}: {device_name(device)}",
        "cpus": str(len(os.sched_getaffinity(0))),  # that this process may use
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        report["cuda"] = str(torch.version.cuda)
        report["cudnn"] = str(torch.backends.cudnn.version())
    return report


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def git_revision(folder: str | Path = _ROOT) -> str | None:
    """Return the commit of a checkout, followed by ``-dirty`` if files differ from it.

    None if ``folder`` is not the top of a checkout, or git is missing: a copy of the project inside
    another repository must not report that repository's commit. Determined once in a process, which
    keeps running the code that it has loaded.
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
        # Without optional locks, so that this neither changes the checkout nor waits for its lock.
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
