"""Signals that ask a process of a run to end."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)
_HEED_S = 10.0


@contextmanager
def handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Handle signals for a while; only the main thread may."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class UnheededSignals:
    """Signals to end that the main thread does not heed, as it waits in a collective or for a GPU.

    Python runs a handler only when the main thread gets back to it; the number of the signal is
    written to a socket at once.
    """

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._since: float | None = None
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

    def unheeded(self) -> bool:
        """Tell whether there was one a while ago; it has not ended the process yet."""
        with suppress(BlockingIOError, OSError):
            if any(number in _ENDING for number in self._read.recv(64)) and self._since is None:
                self._since = time.monotonic()
        if self._since is None or time.monotonic() - self._since < _HEED_S:
            return False
        # A command with handlers of its own finishes what is under way, however long that takes.
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def close(self) -> None:
        """Stop listening."""
        if self._main:
            signal.set_wakeup_fd(-1)
