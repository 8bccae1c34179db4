"""Measure implementations of the same work in turns, each in a separate process.

With separate processes each has its own peak memory and allocator. Turns alternate, so that other
programs on the machine slow all implementations down equally.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tools.lib.command_line import MAX_THREADS, whole_number
from utils.device import resolve_device, set_threads
from utils.errors import UserError, first_line
from utils.logger import Progress

# Does the work once, and returns the number of its images.
Work = Callable[[], int]
# Function that builds the work in the process that runs it, and its arguments.
Maker = tuple[Callable[..., Work], tuple[object, ...]]

_MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices of the ceiling
_PRODUCTS = {"cpu": 3, "cuda": 20}
_PATIENCE_S = 5.0
_KIB_PER_MIB = 1024
_BYTES_PER_MIB = 2**20
_STATUS = Path("/proc/self/status")


def add_measuring_arguments(parser: argparse.ArgumentParser, device: str = "auto") -> None:
    """Add the arguments of most benchmarks: device, threads and repeats."""
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


@dataclass(frozen=True)
class Place:
    """Device and CPU threads (0: torch's choice) of all implementations."""

    device: str
    threads: int


@dataclass(frozen=True)
class Outcome:
    """Results of all implementations."""

    images_per_s: dict[str, float]  # best turn of each implementation
    peak_mib: dict[str, float]  # peak memory of each implementation
    ceiling: float  # FLOP/s of a matrix product

    def numbers(self, flops: float) -> dict[str, float]:
        """Return the content of the JSON file, for ``flops`` operations per image.

        ``share_of_ceiling`` is relative to a matrix product in the same run; ``peak_mib`` is the
        growth of the memory of this project's process (of the GPU) after its imports.
        """
        ours, plain = self.images_per_s["ours"], self.images_per_s["plain"]
        return {
            "images_per_s": ours,
            "plain_images_per_s": plain,
            "ratio": ours / plain,
            "tflops": flops * ours / 1e12,
            "share_of_ceiling": flops * ours / self.ceiling,
            "peak_mib": self.peak_mib["ours"],
        }


def contest(
    place: Place, makers: dict[str, Maker], ceiling: Callable[[], float], repeats: int
) -> Outcome:
    """Run all implementations in turns, and measure the ceiling between turns; the best counts.

    Raises:
        UserError: An implementation failed, for example for lack of memory.
    """
    with contextlib.ExitStack() as stack:
        contenders = {
            name: stack.enter_context(contextlib.closing(Contender(place, make, arguments)))
            for name, (make, arguments) in makers.items()
        }
        best, highest = dict.fromkeys(contenders, 0.0), 0.0
        bar = stack.enter_context(Progress(repeats * len(contenders), "Measure", unit="turn"))
        for _ in range(repeats):
            highest = max(highest, ceiling())
            for name, contender in contenders.items():
                best[name] = max(best[name], contender.images_per_s())
                bar.update()
        peaks = {name: contender.finish() for name, contender in contenders.items()}
    return Outcome(best, peaks, highest)


def describe(title: str, outcome: Outcome, flops: float) -> str:
    """Return the outcome as text of a few lines."""
    n, plain_peak = outcome.numbers(flops), outcome.peak_mib["plain"]
    return (
        f"{title}\n"
        f"  images/s          {n['images_per_s']:12,.2f}\n"
        f"  plain images/s    {n['plain_images_per_s']:12,.2f}   ratio {n['ratio']:.2f}\n"
        f"  TFLOP/s           {n['tflops']:12.4f}   {100 * n['share_of_ceiling']:.2f} % of a "
        f"matrix product's {outcome.ceiling / 1e12:.3f}\n"
        f"  peak memory (MiB) {n['peak_mib']:12,.0f}   plain {plain_peak:,.0f}"
    )


class Contender:
    """One implementation in its process, ready to take turns.

    Args:
        place: Where it runs.
        make: Builds the work in that process; a function of a module.
        arguments: Arguments of ``make``.

    Raises:
        UserError: The work could not be built.
    """

    def __init__(
        self, place: Place, make: Callable[..., Work], arguments: tuple[object, ...]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, place, make, arguments))
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except UserError:
            self.close()
            raise

    def images_per_s(self) -> float:
        """Run one turn; return its speed."""
        return self._ask("turn")

    def finish(self) -> float:
        """End the work; return the peak memory of its process (MiB)."""
        return self._ask("finish")

    def close(self) -> None:
        """End the process in any state."""
        self._pipe.close()
        self._process.join(_PATIENCE_S)  # it ends when the pipe is closed
        self._process.terminate()
        self._process.join()

    def _ask(self, request: str) -> float:
        self._pipe.send(request)
        return self._answer()

    def _answer(self) -> float:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"a measuring process ended with status {self._process.exitcode}, perhaps for lack "
                "of memory; choose a smaller --batch"
            ) from None
        if isinstance(answer, str):
            raise UserError(answer)
        return float(answer)


def _serve(
    pipe: Connection, place: Place, make: Callable[..., Work], arguments: tuple[Any, ...]
) -> None:
    """Build the work, run it once to warm up, and then run a turn for each request."""
    try:
        device = resolve_device(place.device)
        set_threads(place.threads)
        memory = PeakMemory(device)
        work = make(*arguments)
        work()
        pipe.send(0.0)
        while pipe.recv() == "turn":
            count = 0

            def turn() -> None:
                nonlocal count
                count = work()

            spent = seconds(turn, device)
            pipe.send(count / spent)
        pipe.send(memory.mib())
    except (EOFError, KeyboardInterrupt):
        return  # the other process has ended, or reports the interrupt
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        pipe.send(f"{type(error).__name__}: {first_line(error)}")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the duration of work; on a GPU until it has finished."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_product(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that measures FLOP/s of square matrix products, an upper limit."""
    size = _MATRIX.get(device.type, _MATRIX["cpu"])
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(first)

    def measure() -> float:
        torch.mm(first, second, out=out)
        count = _PRODUCTS.get(device.type, _PRODUCTS["cpu"])
        spent = min(seconds(lambda: torch.mm(first, second, out=out), device) for _ in range(count))
        return 2.0 * size**3 / spent

    return measure


class PeakMemory:
    """Growth of the memory in use (MiB) since this object was created: process, or GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.init()  # creates the allocator
            torch.cuda.reset_peak_memory_stats(device)
        self._start = self._peak()

    def mib(self) -> float:
        """Return the growth up to the highest value so far."""
        return self._peak() - self._start

    def _peak(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _BYTES_PER_MIB
        if _STATUS.exists():
            # Not ru_maxrss, which starts at the memory of the parent process.
            line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
            return int(line.split()[1]) / _KIB_PER_MIB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (_BYTES_PER_MIB if sys.platform == "darwin" else _KIB_PER_MIB)
