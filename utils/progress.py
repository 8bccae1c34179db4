"""Progress that knows whether anybody is watching."""

from __future__ import annotations

import sys
import time
from typing import ClassVar

from tqdm import tqdm

from utils.contention import CoreWatch
from utils.logger import get_logger

_QUIET_S = 30.0
_CORES = CoreWatch()


class Progress:
    """How many of ``total`` are done, at which rate, and the time left.

    On a terminal it is a bar that vanishes at the end. Elsewhere (a file, a pipe, CI) it is silent
    but for a log line every half minute: a long run shows that it lives, a short one says nothing.

    Attributes:
        shown: Whether bars are drawn at all; of several processes on one terminal only one draws.

    Example:
        ``with Progress(len(samples), "Epoch 3") as bar: bar.update(len(batch), loss=1.2)``
    """

    shown: ClassVar[bool] = True

    def __init__(
        self, total: int, description: str, *, unit: str = "img", quiet_s: float = _QUIET_S
    ) -> None:
        """Start counting.

        Args:
            total: How many there are.
            description: Words before the count.
            unit: What is counted.
            quiet_s: Without a terminal, the time (s) between two lines.
        """
        self._bar: tqdm | None = None
        self._description, self._unit, self._quiet_s = description, unit, quiet_s
        self._total, self._done, self._note = total, 0, ""
        self._start = self._last = time.monotonic()
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, desc=description, unit=unit, leave=False, dynamic_ncols=True
            )

    def update(self, count: int = 1, **values: float | str) -> None:
        """Count ``count`` more, and show values beside them."""
        self._done += count
        _CORES.look()
        if values:
            shown = (
                f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in values.items()
            )
            self._note = ", ".join(shown)
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif self.shown and time.monotonic() - self._last >= self._quiet_s:
            self._last = time.monotonic()
            get_logger().info(self.line())

    def line(self) -> str:
        """Return the count, rate and time left as one line."""
        return tqdm.format_meter(
            self._done,
            self._total,
            self.elapsed_s,
            ncols=0,
            prefix=self._description,
            unit=self._unit,
            postfix=self._note or None,
        )

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self._done / max(self.elapsed_s, 1e-9)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
