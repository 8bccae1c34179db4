"""Arguments, errors and exit codes of all commands.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted, 141 the reader of a pipe ended
(``| head``). Commands with further codes (1 for a verdict, 3 for the disk) list them in their help.
This module does not load torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol, TypeVar

from utils.errors import (
    UserError,
    optional_package,
    out_of_memory,
    printable,
    shortage,
    worker_death,
    worker_died,
)
from utils.logger import ONLY_IN_FILE, get_logger
from utils.world import World

INTERRUPTED = 130
CLOSED_PIPE = 141  # as shells report a program that SIGPIPE ended
MAX_SEED = 2**63 - 1
MAX_THREADS = 4096

_Number = TypeVar("_Number", int, float)


class Show(Protocol):
    """Prints the result of a command; see ``answer``."""

    def __call__(self, content: object, text: str = "") -> None:
        """Print the text, or the content as JSON."""


def shown(text: str) -> str:
    r"""Return text in which characters that control a terminal or text direction are escaped.

    Example:
        >>> shown("name\x1b[2J")
        'name\\x1b[2J'
    """
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


class Parser(argparse.ArgumentParser):
    """A parser that prints descriptions unchanged, and one line about a mistake."""

    def __init__(self, **settings: Any) -> None:
        """Accept the arguments of argparse."""
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, or answer the shell if it asks for completions."""
        self._complete()
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse options between positional arguments, or answer the shell."""
        self._complete()
        return super().parse_intermixed_args(args, namespace)

    def _complete(self) -> None:
        if "_ARGCOMPLETE" in os.environ:
            optional_package(
                "argcomplete", "shell completion", "pip install argcomplete"
            ).autocomplete(self)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, without the usage, and exit with 2."""
        self.exit(2, shown(f"error: {message}; see {self.prog} --help") + "\n")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return the ``type`` of an argument that is a whole number from ``low`` to ``high``."""
    return _bounded(int, "a whole number", low, high)


def number(low: float, high: float | None = None) -> Callable[[str], float]:
    """Return the ``type`` of an argument that is a number from ``low`` to ``high``."""
    return _bounded(float, "a number", low, high)


def _bounded(
    convert: Callable[[str], _Number], kind: str, low: float, high: float | None
) -> Callable[[str], _Number]:
    allowed = f"of {low} or more" if high is None else f"from {low} to {high}"

    def read(text: str) -> _Number:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if low <= value < math.inf and (high is None or value <= high):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {kind} {allowed}")

    return read


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json to a command that uses ``answer``."""
    parser.add_argument(
        "--json", action="store_true",
        help="print the result as JSON; everything else goes to standard error",
    )  # fmt: skip


@contextlib.contextmanager
def answer(*, as_json: bool) -> Iterator[Show]:
    """Yield ``show(content, text)``, which prints the result of a command.

    It prints the text ('' if it has been logged) or, with ``as_json``, the content as JSON. In the
    second case, everything else that the block prints or logs goes to standard error. Numbers that
    JSON lacks (NaN and infinities) become null.
    """
    output = sys.stdout

    def show(content: object, text: str = "") -> None:
        if as_json:
            text = json.dumps(_without_nan(content), indent=2, default=str)  # dates and paths
            print(text, file=output)
        elif text:
            print(text)

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield show


def _without_nan(content: object) -> object:
    """Return nested containers with None in place of numbers that are not finite."""
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def exit_code_of(
    work: Callable[[], int | None],
    interrupted: str = "interrupted",
    *,
    line: Callable[[Exception], str] = str,
    remedy: str = "",
    failed: int = 1,
) -> int:
    """Do the work of a command; report an error that a user can fix in one line.

    Args:
        work: Returns its exit code; None for 0.
        interrupted: Line that is printed after Ctrl-C; it explains how to resume.
        line: Returns the line for an error.
        remedy: What to do if a disk or device failed; a UserError contains its own remedy.
        failed: Exit code of such a failure.

    Returns:
        The exit code.
    """
    here = World.from_environment()
    who = "" if here.is_main else f"rank {here.rank}: "
    try:
        with _plain_warnings():
            code = work() or 0
            sys.stdout.flush()  # here, since Python's own flush at its end cannot be caught
            return code
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return CLOSED_PIPE
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            if get_logger().handlers:
                get_logger().error("stopped: %s", error, extra=ONLY_IN_FILE)
        advice = "" if isinstance(error, UserError) or not remedy else f"; {remedy}"
        print(printable(f"error: {who}{line(error)}{advice}"), file=sys.stderr)
        return getattr(error, "exit_code", failed)
    except (RuntimeError, MemoryError) as error:
        if worker_died(error):  # torch raises it from its signal handler, in whatever code runs
            text = worker_death("use fewer workers (DATALOADER.NUM_WORKERS or --workers)")
            print(f"error: {who}{text}", file=sys.stderr)
            return failed
        if not out_of_memory(error):
            raise
        print(
            f"error: {who}memory ran out ({shortage(error)}); lower SOLVER.IMS_PER_BATCH, "
            "TEST.IMS_PER_BATCH or --batch, or keep fewer images in memory: CACHE.MODE memory uses "
            "no GPU memory for them, CACHE.MODE stream none at all",
            file=sys.stderr,
        )
        return failed
    except KeyboardInterrupt:
        if here.is_main:
            print(interrupted, file=sys.stderr)
        return INTERRUPTED


def _output_is_closed() -> bool:
    """Return whether the reader of standard output has ended; if so, redirect it to /dev/null."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors are always reported
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)  # otherwise Python's flush at its end prints an error
    os.close(nowhere)
    return True


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as one sentence, without the line of code that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
