"""Let Ctrl-C wait while something runs that must not be left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Deliver a SIGINT that arrives in the block when it is done.

    Python raises KeyboardInterrupt between any two instructions, also between taking a lock and
    entering the block that gives it back; whoever needs that lock next waits for ever. Hold
    interrupts around short calls into code that shares locks with its own threads.

    Outside the main thread, which alone receives signals, this does nothing. An error of the block
    goes first: the program ends by it anyway.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[-1])
