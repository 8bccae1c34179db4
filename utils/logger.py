"""Log lines on the terminal and in ``log.txt``; progress as a bar on terminals, else in the log."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from utils.errors import printable
from utils.files import WriteError, ensure_folder

if TYPE_CHECKING:
    from tqdm import tqdm

LOGGER_NAME = "reid_baseline"  # scripts that read log.txt expect it
FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"
_QUIET_S = 30.0
# `extra` of a record that the terminal already shows in another form.
ONLY_IN_FILE = {"only_in_file": True}

_Item = TypeVar("_Item")


def _tqdm() -> type[tqdm]:
    """Return tqdm, which is loaded here: commands without progress do not wait for it."""
    from tqdm import tqdm

    return tqdm


def get_logger() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger(LOGGER_NAME)


def setup_logger(output_dir: str | Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Log to the terminal and to ``output_dir/log.txt``, which is appended to.

    The folder is created if necessary; None logs to the terminal only. A second call replaces the
    handlers of the first, so that no line is logged twice.

    Raises:
        WriteError: The folder or the file cannot be written.
    """
    logger = get_logger()
    close_logger()
    logger.setLevel(level)
    logger.propagate = False
    handlers: list[logging.Handler] = [_TerminalHandler(sys.stdout)]
    if output_dir is not None:
        path = ensure_folder(output_dir) / "log.txt"
        try:
            # Appended, so that a resumed run keeps the lines of the run that it continues.
            handlers.append(_LogFile(path, mode="a", encoding="utf-8"))
        except OSError as error:
            raise WriteError(
                f"cannot write {path}: {error.strerror}; choose another output folder"
            ) from error
    for handler in handlers:
        handler.setFormatter(_Formatter(FORMAT))
        logger.addHandler(handler)
    return logger


def close_logger() -> None:
    """Close and remove the handlers of the logger."""
    logger = get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class _Formatter(logging.Formatter):
    """Formats lines that every terminal and file can show."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """Stops the run if a line cannot be written; the base class prints a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Raise the error as one sentence."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        # If it stayed open, its buffer would fail again on closing.
        with contextlib.suppress(OSError):
            if self.stream is not None:
                self.stream.close()
        get_logger().removeHandler(self)
        raise WriteError(
            f"cannot write {self.baseFilename}: {error.strerror}; free some space or choose "
            "another output folder"
        ) from error


class _TerminalHandler(logging.StreamHandler):
    """Writes lines above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if getattr(record, "only_in_file", False):
            return
        try:
            with _tqdm().external_write_mode(file=self.stream):
                self.stream.write(self.format(record) + self.terminator)
                self.flush()
        except (OSError, ValueError):
            self.handleError(record)


class Progress:
    """Counts finished items, and shows their rate and the time that is left.

    On a terminal this is a bar of tqdm that disappears at the end. Elsewhere (files, pipes, CI) it
    writes a line every half minute, so that short work writes nothing: to the log, or to standard
    error if there is no log.

    Example:
        ``with Progress(len(samples), "Epoch 3") as bar: bar.update(len(batch), loss=1.2)``
    """

    # Whether anything is shown. In a distributed run only rank 0 shows progress.
    shown: ClassVar[bool] = True

    def __init__(
        self, total: int, description: str, *, unit: str = "img", quiet_s: float = _QUIET_S
    ) -> None:
        """Start counting."""
        self._bar: tqdm | None = None
        self._description, self._unit, self._quiet_s = description, unit, quiet_s
        self._total, self._done, self._note = total, 0, ""
        self._start = self._last_line = time.monotonic()
        if self.shown and sys.stderr.isatty():
            self._bar = _tqdm()(
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
            if get_logger().hasHandlers():
                get_logger().info(self.line())
            else:  # commands whose standard output is the result have no log
                sys.stderr.write(f"{self.line()}\n")
                sys.stderr.flush()

    def line(self) -> str:
        """Return count, rate and remaining time as one line."""
        return _tqdm().format_meter(
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
