"""The project's logger: to the terminal, and appended to ``log.txt`` in the output folder."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from utils.files import WriteError, ensure_folder

LOGGER_NAME = "reid_baseline"  # scripts that read log.txt look for it
FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"
# `extra` of a record that the terminal shows in another form already.
ONLY_IN_FILE = {"only_in_file": True}


def get_logger() -> logging.Logger:
    """Return the project's one logger."""
    return logging.getLogger(LOGGER_NAME)


def setup_logger(output_dir: str | Path | None = None, level: int = logging.INFO) -> logging.Logger:
    """Send the logger's lines to the terminal and, appended, to ``output_dir/log.txt``.

    A second call replaces the handlers of the first, so lines never come twice.

    Args:
        output_dir: Folder for ``log.txt``, made if need be; None for the terminal alone.
        level: Least level that is shown.

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
            # Appended: a resumed run must not lose the lines of the one it goes on from.
            handlers.append(_LogFile(path, mode="a", encoding="utf-8"))
        except OSError as error:
            raise WriteError(
                f"cannot write {path}: {error.strerror}; choose another OUTPUT_DIR"
            ) from error
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    return logger


def close_logger() -> None:
    """Close and take off the handlers of the logger."""
    logger = get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """Stops the run when a line cannot be written, where others print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Raise what happened as one sentence."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        # Left open, its buffer would fail again on closing.
        with contextlib.suppress(OSError):
            if self.stream is not None:
                self.stream.close()
        get_logger().removeHandler(self)
        raise WriteError(
            f"cannot write {self.baseFilename}: {error.strerror}; free some space or choose "
            "another OUTPUT_DIR"
        ) from error


class _TerminalHandler(logging.StreamHandler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if getattr(record, "only_in_file", False):
            return
        from tqdm import tqdm  # here: tools that show no bar should not wait for the import

        try:
            with tqdm.external_write_mode(file=self.stream):
                self.stream.write(self.format(record) + self.terminator)
                self.flush()
        except (OSError, ValueError):
            self.handleError(record)
