"""Text of somebody else's making on a terminal.

What every command does alike: refuse wrong arguments, and end with one line and a code.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted, 141 nobody reads on (`| head`); a
command whose codes say more (1 is a verdict, 3 the disk) names them in its help. Nothing here loads
torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from utils.errors import (
    UserError,
    optional_package,
    out_of_memory,
    shortage,
    worker_death,
    worker_died,
)
from utils.logger import ONLY_IN_FILE, get_logger
from utils.world import World


def shown(text: str) -> str:
    r"""Return text without what would steer a terminal: control and direction characters.

    Example:
        >>> shown("name\x1b[2J")
        'name\\x1b[2J'
    """
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


INTERRUPTED = 130
CLOSED_PIPE = 141  # as a shell says of a program that SIGPIPE ended
MAX_SEED = 2**63 - 1  # as for SOLVER.SEED
MAX_THREADS = 4096  # as for RUNTIME.THREADS

_Number = TypeVar("_Number", int, float)


class Parser(argparse.ArgumentParser):
    """A parser that prints descriptions as they are written, and one line about a mistake."""

    def __init__(self, **settings: Any) -> None:
        """Take what argparse takes."""
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
        """Say what is wrong, without the whole usage, and exit with 2."""
        self.exit(2, shown(f"error: {message}; see {self.prog} --help") + "\n")


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return the ``type`` of an argument that is a whole number from ``low`` to ``high``."""
    return _bounded(int, "a whole number", low, high)


def number(low: float, high: float | None = None) -> Callable[[str], float]:
    """Return the ``type`` of an argument that is a number from ``low`` to ``high``."""
    return _bounded(_finite, "a number", low, high)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _bounded(
    convert: Callable[[str], _Number], kind: str, low: float, high: float | None
) -> Callable[[str], _Number]:
    def read(text: str) -> _Number:
        try:
            value = convert(text)
        except ValueError:
            raise _refused(text, kind, low, high) from None
        if value < low or (high is not None and value > high):
            raise _refused(text, kind, low, high)
        return value

    return read


def _refused(text: str, kind: str, low: float, high: float | None) -> argparse.ArgumentTypeError:
    allowed = f"of {low} or more" if high is None else f"from {low} to {high}"
    return argparse.ArgumentTypeError(f"got {text!r}, expected {kind} {allowed}")


def exit_code_of(
    work: Callable[[], int | None],
    interrupted: str = "interrupted",
    *,
    line: Callable[[Exception], str] = str,
    remedy: str = "",
    failed: int = 1,
) -> int:
    """Do something; what a user can mend becomes one line and an exit code, not a traceback.

    Args:
        work: Returns its exit code; None for 0.
        interrupted: What to say after Ctrl-C: above all how to go on.
        line: Returns what to say of an error.
        remedy: What to do where a disk or device failed; mistakes bring their own.
        failed: Exit code of that.
    """
    here = World.from_environment()
    who = "" if here.is_main else f"rank {here.rank}: "
    try:
        with _plain_warnings():
            code = work() or 0
            sys.stdout.flush()  # here, not at the end of Python, a closed pipe can be told
            return code
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return CLOSED_PIPE
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            if get_logger().handlers:
                get_logger().error("stopped: %s", error, extra=ONLY_IN_FILE)
        advice = "" if isinstance(error, UserError) or not remedy else f"; {remedy}"
        print(f"error: {who}{line(error)}{advice}", file=sys.stderr)
        return getattr(error, "exit_code", failed)
    except (RuntimeError, MemoryError) as error:
        if worker_died(error):  # torch raises it from its signal handler, in whatever code runs
            told = worker_death("use fewer workers (DATALOADER.NUM_WORKERS or --workers)")
            print(f"error: {who}{told}", file=sys.stderr)
            return failed
        if not out_of_memory(error):
            raise
        print(
            f"error: {who}memory ran out ({shortage(error)}); lower SOLVER.IMS_PER_BATCH, "
            "TEST.IMS_PER_BATCH or --batch, or keep images out of it: CACHE.MODE memory leaves a "
            "GPU's alone, CACHE.MODE stream all",
            file=sys.stderr,
        )
        return failed
    except KeyboardInterrupt:
        if here.is_main:
            print(interrupted, file=sys.stderr)
        return INTERRUPTED


def _nobody_reads() -> bool:
    """Tell whether the reader of standard output has ended; then nothing more is written to it."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # not a file
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors are told unasked
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)  # or Python's own flush at the end would complain
    os.close(nowhere)
    return True


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print a warning as one sentence: the line of code it comes from tells a user nothing."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
