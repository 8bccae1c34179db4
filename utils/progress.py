"""A progress bar on terminals; a log line every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from typing import ClassVar, TypeVar

from tqdm import tqdm

from utils.logger import get_logger

_QUIET_S = 30.0

_Item = TypeVar("_Item")


class Progress:
    """Counts finished items, and shows their rate and the time that is left.

    On a terminal this is a bar of tqdm that disappears at the end. Elsewhere (files, pipes, CI) it
    writes a log line every half minute, so that short work logs nothing.

    Attributes:
        shown: Whether anything is shown. In a distributed run only rank 0 shows progress.

    Example:
        ``with Progress(len(samples), "Epoch 3") as bar: bar.update(len(batch), loss=1.2)``
    """

    shown: ClassVar[bool] = True

    def __init__(
        self, total: int, description: str, *, unit: str = "img", quiet_s: float = _QUIET_S
    ) -> None:
        """Start counting.

        Args:
            total: Number of items.
            description: Text before the count.
            unit: Name of an item.
            quiet_s: Time (s) between two log lines, off a terminal.
        """
        self._bar: tqdm | None = None
        self._description, self._unit, self._quiet_s = description, unit, quiet_s
        self._total, self._done, self._note = total, 0, ""
        self._start = self._last_line = time.monotonic()
        if self.shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, desc=description, unit=unit, leave=False, dynamic_ncols=True
            )

    @classmethod
    def over(
        cls, items: Collection[_Item], description: str, *, unit: str = "img"
    ) -> Iterator[_Item]:
        """Yield items, and count each when the next one is asked for."""
        with cls(len(items), description, unit=unit) as bar:
            for item in items:
                yield item
                bar.update()

    def update(self, count: int = 1, **values: float | str) -> None:
        """Add ``count`` finished items, and show values next to the count."""
        self._done += count
        if values:
            self._note = ", ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                for name, value in values.items()
            )
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif self.shown and time.monotonic() - self._last_line >= self._quiet_s:
            self._last_line = time.monotonic()
            get_logger().info(self.line())

    def line(self) -> str:
        """Return count, rate and remaining time as one line."""
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
        """Items per second since the start."""
        return self._done / max(self.elapsed_s, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
