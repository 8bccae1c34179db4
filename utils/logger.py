"""The project's logger: to the terminal, and appended to ``log.txt`` in the output folder."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from utils.errors import printable
from utils.files import WriteError, ensure_folder

LOGGER_NAME = "reid_baseline"  # scripts that read log.txt expect it
FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"
# `extra` of a record that the terminal already shows in another form.
ONLY_IN_FILE = {"only_in_file": True}


def get_logger() -> logging.Logger:
    """Return the project's logger."""
    return logging.getLogger(LOGGER_NAME)


def setup_logger(output_dir: str | Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Log to the terminal and to ``output_dir/log.txt``, which is appended to.

    A second call replaces the handlers of the first, so that no line is logged twice.

    Args:
        output_dir: Folder for ``log.txt``, created if necessary; None for the terminal only.
        level: Lowest level that is logged.

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
        from tqdm import tqdm  # here, since tools without a bar should not wait for the import

        try:
            with tqdm.external_write_mode(file=self.stream):
                self.stream.write(self.format(record) + self.terminator)
                self.flush()
        except (OSError, ValueError):
            self.handleError(record)
