"""Threads of one operation on cores that other programs want, too.

PyTorch splits an operation among threads of GNU OpenMP, and none goes on before the last one is
done. Where another program has a core, the last one stands in line for it, at each of thousands of
operations a step: a training then keeps a twentieth of its speed, not half (docs/PERFORMANCE.md).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from utils.logger import get_logger

# Rounds of an empty loop, some tenths of a millisecond: longer than the threads of one operation
# are apart when each has a core of its own, and a tenth of a scheduler's turn.
_ROUNDS = "5000"
_THREADS = Path("/proc/self/task")
_PERIOD_S = 10.0
_MUCH = 0.2  # alone on the cores it is .01, beside one busy program .3 to .5


def limit_spinning(environment: MutableMapping[str, str]) -> None:
    """Let a thread that waits for another one sleep soon; a user's own settings are kept.

    By default it spins for 300,000 rounds, which are milliseconds, and uses up the time that the
    last thread was to get. Alone on its cores a program is as fast either way.

    It is read when the library is loaded, with torch, and by child processes.

    Args:
        environment: os.environ, before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _ROUNDS)


class CoreWatch:
    """Says once that threads stand in line, and what helps; asked now and then by long work.

    The number of threads is not changed: it would change rounding, and a run could not be repeated.
    """

    def __init__(self) -> None:
        """Start watching."""
        self._said = False
        self._last, self._waited_s = time.monotonic(), waited_for_cores_s()

    def look(self) -> None:
        """Compare with the last look, if that was some seconds ago."""
        seconds = time.monotonic() - self._last
        if self._said or seconds < _PERIOD_S:
            return
        waited_s, threads = waited_for_cores_s(), _num_threads()
        share = (waited_s - self._waited_s) / (seconds * threads)
        self._last, self._waited_s = time.monotonic(), waited_s
        if threads > 1 and share > _MUCH:
            self._said = True
            get_logger().warning(
                "Other processes use the cores: the %d threads of each operation, which wait for "
                "the last of them, stood in line for %.0f %% of the time; one thread for each free "
                "core is then many times as fast: OMP_NUM_THREADS=1 (or as many as are free) "
                "before the same command, or RUNTIME.THREADS 1",
                threads, 100 * share,
            )  # fmt: skip


def waited_for_cores_s() -> float:
    """Return for how long (s) this process's threads could have run and had no core; 0 if unknown.

    Source: Linux's sched-stats, the second number of each thread, in nanoseconds.
    """
    total = 0
    for thread in _THREADS.glob("*/schedstat"):
        # One may end meanwhile, and the kernel may keep no such statistics.
        with contextlib.suppress(OSError, IndexError, ValueError):
            total += int(thread.read_text().split()[1])
    return total / 1e9


def _num_threads() -> int:
    torch = sys.modules.get("torch")  # work without it uses one
    return torch.get_num_threads() if torch is not None else 1
