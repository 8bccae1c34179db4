"""What benchmarks share: time, peak memory, and the file of numbers."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.command_line import MAX_THREADS, whole_number
from utils.files import write_text

_KIB_PER_MIB = 1024
_BYTES_PER_MIB = 2**20
_STATUS = Path("/proc/self/status")


def add_measuring_arguments(parser: argparse.ArgumentParser, device: str = "auto") -> None:
    """Add where to measure, how often, and where to write the numbers.

    Args:
        parser: Of a benchmark.
        device: What it measures on unless told otherwise.
    """
    parser.add_argument("--device", default=device, help=f"auto, cpu, cuda or cuda:N ({device})")
    parser.add_argument(
        "--threads",
        type=whole_number(0, MAX_THREADS),
        default=0,
        help="CPU threads; 0: torch's choice",
    )
    parser.add_argument(
        "--repeats", type=whole_number(1), default=3, help="turns, of which the best counts (3)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


class PeakMemory:
    """Growth of the memory in use since this was made (MiB): of the process, or of the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.init()  # before that there is no allocator to ask
            torch.cuda.reset_peak_memory_stats(device)
        self._start = self._peak()

    def mib(self) -> float:
        """Return the growth up to the highest point so far."""
        return self._peak() - self._start

    def _peak(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _BYTES_PER_MIB
        if _STATUS.exists():
            # The system's other count, ru_maxrss, starts at what the parent held when it forked.
            line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
            return int(line.split()[1]) / _KIB_PER_MIB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (_BYTES_PER_MIB if sys.platform == "darwin" else _KIB_PER_MIB)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long some work takes, on a GPU until it is done."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of numbers, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
