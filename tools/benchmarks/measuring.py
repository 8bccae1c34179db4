"""Measure implementations of the same work in turns, each in a separate process.

With separate processes each has its own peak memory and allocator. Turns alternate, so that other
programs on the machine slow all implementations down equally.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.lib.command_line import MAX_THREADS, whole_number
from utils.device import device_name, precision_name, resolve_device, set_threads
from utils.errors import UserError, first_line
from utils.logger import Progress
from utils.memory import MIB

# Does the work once, and returns the number of its images.
Work = Callable[[], int]
# Function that builds the work in the process that runs it, and its arguments.
Maker = tuple[Callable[..., Work], tuple[object, ...]]

_MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices of the ceiling
_PRODUCTS = {"cpu": 3, "cuda": 20}
_KIB_PER_MIB = 1024


def add_measuring_arguments(parser: argparse.ArgumentParser, device: str = "auto") -> None:
    """Add the arguments of most benchmarks: device, threads and repeats."""
    parser.add_argument("--device", default=device, help=f"auto, cpu, cuda or cuda:N ({device})")
    parser.add_argument(
        "--threads", type=whole_number(0, MAX_THREADS), default=0,
        help="CPU threads; 0: torch's choice",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=whole_number(1), default=3, help="turns, of which the best counts (3)"
    )


@dataclass(frozen=True)
class Outcome:
    """Results of all implementations."""

    images_per_s: dict[str, float]  # best turn of each implementation
    peak_mib: dict[str, float]  # peak memory of each implementation
    ceiling: float  # FLOP/s of a matrix product
    flops: float  # operations per image

    @property
    def numbers(self) -> dict[str, float]:
        """The content of the JSON file.

        ``share_of_ceiling`` is relative to a matrix product in the same run; ``peak_mib`` is the
        growth of the memory of this project's process (of the GPU) after its imports.
        """
        ours, plain = self.images_per_s["ours"], self.images_per_s["plain"]
        return {
            "images_per_s": ours,
            "plain_images_per_s": plain,
            "ratio": ours / plain,
            "tflops": self.flops * ours / 1e12,
            "share_of_ceiling": self.flops * ours / self.ceiling,
            "peak_mib": self.peak_mib["ours"],
        }

    def __str__(self) -> str:
        n = self.numbers
        return (
            f"  images/s          {n['images_per_s']:12,.2f}\n"
            f"  plain images/s    {n['plain_images_per_s']:12,.2f}   ratio {n['ratio']:.2f}\n"
            f"  TFLOP/s           {n['tflops']:12.4f}   {100 * n['share_of_ceiling']:.2f} % of a "
            f"matrix product's {self.ceiling / 1e12:.3f}\n"
            f"  peak memory (MiB) {n['peak_mib']:12,.0f}   plain {self.peak_mib['plain']:,.0f}"
        )


def contest(
    arguments: argparse.Namespace, precision: torch.dtype, flops: float, makers: Mapping[str, Maker]
) -> Outcome:
    """Run all implementations in turns, and measure the ceiling between turns; the best counts.

    Args:
        arguments: Those of :func:`add_measuring_arguments`.
        precision: Number type of the ceiling.
        flops: Operations per image.
        makers: The implementations by name.

    Raises:
        UserError: An implementation failed, for example for lack of memory.
    """
    device, repeats = resolve_device(arguments.device), arguments.repeats
    ceiling = matrix_product(device, precision)
    with contextlib.ExitStack() as stack:
        contenders = {
            name: stack.enter_context(
                contextlib.closing(Contender(str(device), arguments.threads, *maker))
            )
            for name, maker in makers.items()
        }
        best, highest = dict.fromkeys(contenders, 0.0), 0.0
        bar = stack.enter_context(Progress(repeats * len(contenders), "Measure", unit="turn"))
        for _ in range(repeats):
            highest = max(highest, ceiling())
            for name, contender in contenders.items():
                best[name] = max(best[name], contender.images_per_s())
                bar.update()
        peaks = {name: contender.peak_mib() for name, contender in contenders.items()}
    return Outcome(best, peaks, highest, flops)


def conditions(precision: torch.dtype, device: torch.device) -> str:
    """Return the end of a title: number type, machine, threads and version."""
    return (
        f"{precision_name(precision)}, on {device_name(device)}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}"
    )


class Contender:
    """One implementation in its process, ready to take turns.

    Args:
        device: Where it runs.
        threads: CPU threads; 0: torch's choice.
        make: Builds the work in that process; a function of a module.
        arguments: Arguments of ``make``.

    Raises:
        UserError: The work could not be built.
    """

    def __init__(
        self, device: str, threads: int, make: Callable[..., Work], arguments: tuple[object, ...]
    ) -> None:
        self._process = ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            signal.signal,  # so that Ctrl-C ends the process without a message
            (signal.SIGINT, signal.SIG_DFL),
        )
        self._work = (device, threads, make, arguments)
        self.peak_mib()  # builds the work

    def images_per_s(self) -> float:
        """Run one turn; return its speed."""
        return self._ask("turn")

    def peak_mib(self) -> float:
        """Return the peak memory of the process (MiB)."""
        return self._ask("peak")

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()

    def _ask(self, request: str) -> float:
        try:
            return self._process.submit(measure, request, *self._work).result()
        except BrokenProcessPool:
            raise UserError(
                "a measuring process was killed, perhaps for lack of memory; choose a smaller "
                "--batch"
            ) from None


def measure(
    request: str,
    device: str,
    threads: int,
    make: Callable[..., Work],
    arguments: tuple[object, ...],
) -> float:
    """Return the speed of one turn (images/s), or the peak memory (MiB) if ``peak`` is requested.

    Raises:
        UserError: The work failed, or could not be built.
    """
    try:
        work, count, memory = _prepared(device, threads, make, arguments)
        return memory.mib() if request == "peak" else count / seconds(work, torch.device(device))
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        raise UserError(f"{type(error).__name__}: {first_line(error)}") from None


@functools.cache  # once in each process
def _prepared(
    device: str, threads: int, make: Callable[..., Work], arguments: tuple[object, ...]
) -> tuple[Work, int, PeakMemory]:
    """Build the work and run it once to warm up; return it with its number of images."""
    set_threads(threads)
    memory = PeakMemory(torch.device(device))
    work = make(*arguments)
    return work, work(), memory


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the duration of work; on a GPU until it has finished."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def wall_and_cpu_s(work: Callable[[], object]) -> tuple[float, float]:
    """Return the duration of work and the CPU time of all threads (s)."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


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
            return torch.cuda.max_memory_allocated(self._device) / MIB
        # Not ru_maxrss, which starts at the memory of the parent process.
        status = Path("/proc/self/status").read_text("utf-8").splitlines()
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) / _KIB_PER_MIB
