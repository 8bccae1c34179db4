"""What benchmarks share: time, peak memory, and the file of numbers.

Two ways to do the same work, each in a process of its own, measured turn by turn.

A process of its own gives each its peak memory and its allocator; turns by turn, because other
work on the machine then slows both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tools.lib.command_line import MAX_THREADS, whole_number
from utils.device import resolve_device, set_threads
from utils.errors import UserError
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


# Does some work once, and returns for how many images.
Work = Callable[[], int]
# What builds the work in the process that runs it, and its arguments.
Maker = tuple[Callable[..., Work], tuple[object, ...]]

_MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices that show the ceiling
_PATIENCE_S = 5.0
_PRODUCTS = {"cpu": 3, "cuda": 20}


@dataclass(frozen=True)
class Numbers:
    """What a benchmark prints, and writes with ``--json``.

    Attributes:
        images_per_s: Of this project.
        plain_images_per_s: Of the plain loop, in the same run.
        ratio: The one over the other.
        tflops: 10^12 floating-point operations a second that this project's work amounts to.
        share_of_ceiling: That over what a matrix product reaches in the same run and type.
        peak_mib: Growth of this project's process (on a GPU: of its memory) over the imports.
    """

    images_per_s: float
    plain_images_per_s: float
    ratio: float
    tflops: float
    share_of_ceiling: float
    peak_mib: float

    def as_dict(self) -> dict[str, float]:
        """Return the content of the JSON file."""
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """Where both ways run: device and CPU threads (0: torch's choice)."""

    device: str
    threads: int


class Contender:
    """One way to do the work, ready to take turns.

    Args:
        place: Where it runs.
        make: Builds the work in the process that runs it; a function of a module.
        arguments: What ``make`` is given.

    Raises:
        UserError: It could not be built.
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
        """Do the work once."""
        return self._ask("turn")

    def finish(self) -> float:
        """End the work; returns the peak memory of its process (MiB)."""
        return self._ask("finish")

    def close(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.join(_PATIENCE_S)  # it ends by itself when it has nobody to talk to
        self._process.terminate()
        self._process.join()

    def _ask(self, what: str) -> float:
        self._pipe.send(what)
        return self._answer()

    def _answer(self) -> float:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"a measuring process ended with status {self._process.exitcode}; expected it to "
                "live: was there enough memory? Take a smaller --batch"
            ) from None
        if isinstance(answer, str):
            raise UserError(answer)
        return float(answer)


@dataclass(frozen=True)
class Outcome:
    """Best turns and peak memory by contender, and the ceiling of the same run.

    Attributes:
        images_per_s: Best turn of each.
        peak_mib: Peak memory of each.
        ceiling: FLOP/s of a matrix product.
    """

    images_per_s: dict[str, float]
    peak_mib: dict[str, float]
    ceiling: float

    def numbers(self, flops: float) -> Numbers:
        """Return the numbers of ``ours`` against ``plain``, at so many operations an image."""
        ours, plain = self.images_per_s["ours"], self.images_per_s["plain"]
        return Numbers(
            images_per_s=ours,
            plain_images_per_s=plain,
            ratio=ours / plain,
            tflops=flops * ours / 1e12,
            share_of_ceiling=flops * ours / self.ceiling,
            peak_mib=self.peak_mib["ours"],
        )


def contest(
    place: Place, makers: dict[str, Maker], ceiling: Callable[[], float], repeats: int
) -> Outcome:
    """Let all take turns, and the ceiling be measured between; the best of each counts.

    Raises:
        UserError: One of them failed, for lack of memory for example.
    """
    with contextlib.ExitStack() as stack:
        contenders = {
            name: stack.enter_context(contextlib.closing(Contender(place, make, arguments)))
            for name, (make, arguments) in makers.items()
        }
        best, highest = dict.fromkeys(contenders, 0.0), 0.0
        for _ in range(repeats):
            highest = max(highest, ceiling())
            for name, contender in contenders.items():
                best[name] = max(best[name], contender.images_per_s())
        peaks = {name: contender.finish() for name, contender in contenders.items()}
    return Outcome(best, peaks, highest)


def matrix_product(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """Return what measures FLOP/s of square matrix products: the ceiling of all networks."""
    size = _MATRIX.get(device.type, _MATRIX["cpu"])
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(first)

    def measure() -> float:
        torch.mm(first, second, out=out)
        count = _PRODUCTS.get(device.type, _PRODUCTS["cpu"])
        spent = min(seconds(lambda: torch.mm(first, second, out=out), device) for _ in range(count))
        return 2.0 * size**3 / spent

    return measure


def describe(title: str, outcome: Outcome, flops: float) -> str:
    """Return the outcome as a few lines."""
    numbers, plain_peak = outcome.numbers(flops), outcome.peak_mib["plain"]
    return (
        f"{title}\n"
        f"  images/s          {numbers.images_per_s:12,.2f}\n"
        f"  plain images/s    {numbers.plain_images_per_s:12,.2f}   ratio {numbers.ratio:.2f}\n"
        f"  TFLOP/s           {numbers.tflops:12.4f}   {100 * numbers.share_of_ceiling:.2f} % of a "
        f"matrix product's {outcome.ceiling / 1e12:.3f}\n"
        f"  peak memory (MiB) {numbers.peak_mib:12,.0f}   plain {plain_peak:,.0f}"
    )


def _serve(
    pipe: Connection, place: Place, make: Callable[..., Work], arguments: tuple[Any, ...]
) -> None:
    """Build the work, warm up, and take turns until told to finish."""
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
    except EOFError:
        return  # the other end is gone
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
