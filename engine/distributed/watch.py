"""Watching over the processes of a run: none waits for one that is gone.

A process that waits in a collective learns nothing of one that failed elsewhere. So each has a
thread that beats in the store which torchrun keeps for the run, reads there whether anybody has
failed, and ends its process if so; the first process says why. A process that neither beats nor
said goodbye has been killed, or its machine has failed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from engine.distributed.signals import UnheededSignals
from utils.errors import UserError
from utils.logger import get_logger

_LOGGER = get_logger()

BEAT_S = 0.5
SILENT_S = 30.0  # a busy machine may delay a thread by seconds, not by this
_PATIENCE_S = 4 * BEAT_S  # how long an ending process waits for the reason, or for its hearing
_INTERRUPTED = "interrupted"


class RankLostError(UserError):
    """Another process of the run failed or is gone."""

    exit_code = 1


class Terminated(BaseException):
    """This process was told to end, as torchrun does when another one has failed."""


@dataclass
class _Heard:
    """Last beat of a process, and when it was new."""

    beat: int = 0
    time: float = field(default_factory=time.monotonic)


class Watch:
    """Beats for this process and listens to the others, in a thread.

    Args:
        rank: This process.
        size: Number of processes.
        start: Which start of the processes this is.
    """

    def __init__(self, rank: int, size: int, *, start: int = 1) -> None:
        self._rank, self._size = rank, size
        # A connection of its own: the process group's may be waiting for something.
        client = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SILENT_S),
        )
        self._store = distributed.PrefixStore(f"securereid/watch/{start}", client)
        self._heard = {other: _Heard() for other in range(size) if other != rank}
        self._alive = time.monotonic()
        self._closing = threading.Event()
        self._ending = threading.Lock()  # whoever holds it speaks for this process
        self._signals = UnheededSignals()
        for work in (self._listen, self._guard):
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Say goodbye."""
        self._closing.set()
        self._signals.close()
        with suppress(RuntimeError):  # the store may be gone already
            self._store.set(f"left/{self._rank}", "")

    def end_with(self, error: BaseException) -> None:
        """Tell the others what ended this process, or find out who ended it.

        Returns where ``error`` was first, and is to be raised as it is.

        Raises:
            RankLostError, KeyboardInterrupt: On the first process, if another one failed before.
                Processes besides the first end here and now.
        """
        self._ending.acquire()  # never released: this process is ending
        if not _is_symptom(error):
            with suppress(RuntimeError):
                if self._tell(f"rank {self._rank}: {_described(error)}", type(error)):
                    _record(error)
                    return
        self._end(self._cause())

    def _tell(self, reason: str, kind: type[BaseException] | None = None) -> bool:
        """Say why the run ends, if nobody has, and wait until the others know."""
        if self._store.add("claims", 1) != 1:
            return False
        self._store.set("failed", _INTERRUPTED if kind is KeyboardInterrupt else reason)
        self._linger()
        return True

    def _linger(self) -> None:
        """Wait a little until all know why the run ends: this process may keep the store."""
        give_up = time.monotonic() + _PATIENCE_S
        waiting = [other for other in self._heard if self._rank == 0 or other == 0]
        keys = ("heard", "left")
        with suppress(RuntimeError):  # the store may end before this process
            self._store.set(f"heard/{self._rank}", "")
            while waiting and time.monotonic() < give_up:
                waiting = [
                    o for o in waiting if not any(self._store.check([f"{k}/{o}"]) for k in keys)
                ]
                time.sleep(BEAT_S / 10)

    def _cause(self) -> str:
        """Find out what ended the run: what somebody said, or who fell silent."""
        give_up = time.monotonic() + _PATIENCE_S
        try:
            before = {other: self._beat_of(other) for other in self._heard}
            while time.monotonic() < give_up:
                if self._store.check(["failed"]):
                    return self._store.get("failed").decode()
                time.sleep(BEAT_S / 10)
            gone = [other for other in before if self._beat_of(other) == before[other]]
        except RuntimeError:
            return "the process that keeps the run's store has ended"
        if not gone:
            return "the run was ended from outside"
        ranks = ", ".join(map(str, gone))
        return f"rank {ranks} ended without a word (killed, or its machine failed)"

    def _end(self, reason: str) -> NoReturn:
        """End this process because of another one; the first speaks, unless it is the one."""
        interrupted = reason == _INTERRUPTED
        self._linger()
        if self._rank:
            os._exit(130 if interrupted else RankLostError.exit_code)
        if interrupted:
            raise KeyboardInterrupt
        raise RankLostError(f"{reason}; what was saved is whole") from None

    def _listen(self) -> None:
        """Beat, and end this process when the run has failed."""
        while not self._closing.wait(BEAT_S):
            now = time.monotonic()
            paused = now - self._alive > 10 * BEAT_S  # all of the run, or this process alone
            try:
                self._store.add(f"beat/{self._rank}", 1)
                if self._store.check(["failed"]):
                    self._stop(self._store.get("failed").decode())
                if self._signals.unheeded():
                    self._tell("interrupted", KeyboardInterrupt)
                    self._stop(_INTERRUPTED)
                silent = self._silent(paused)
            except RuntimeError as error:
                if not self._closing.is_set():
                    self._stop(f"the run's store is gone ({_first_line(error)})", speak=True)
                return
            self._alive = time.monotonic()
            if silent:
                reason = (
                    f"rank {', '.join(map(str, silent))} has not been heard of for {SILENT_S:.0f} "
                    "s: killed, stopped, or its machine failed"
                )
                self._tell(reason)
                self._stop(reason, speak=0 in silent)

    def _guard(self) -> None:
        """End this process if even the store does not answer: its machine has failed."""
        while not self._closing.wait(BEAT_S):
            if time.monotonic() - self._alive > 1.5 * SILENT_S:
                self._stop("the run's store does not answer: its machine failed", speak=True)

    def _silent(self, paused: bool) -> list[int]:
        """Return who has been silent for too long; the first looks after all, all after it."""
        now, found = time.monotonic(), []
        for other in self._heard if self._rank == 0 else (0,):
            beat, heard = self._beat_of(other), self._heard[other]
            if beat != heard.beat or paused:
                self._heard[other] = _Heard(beat, now)
            elif now - heard.time > SILENT_S and not self._store.check([f"left/{other}"]):
                found.append(other)
        return found

    def _beat_of(self, rank: int) -> int:
        return int(self._store.add(f"beat/{rank}", 0))

    def _stop(self, reason: str, *, speak: bool = False) -> None:
        """End the process from this thread: the main one may be waiting for somebody gone."""
        if self._closing.is_set() or not self._ending.acquire(timeout=2 * SILENT_S):
            return
        interrupted = reason == _INTERRUPTED
        if self._rank == 0 or speak:
            text = f"{reason}; what was saved is whole"
            with suppress(OSError):
                if self._rank == 0 and not interrupted:
                    _LOGGER.error("stopped: %s", text)
                print("interrupted" if interrupted else f"error: {text}", file=sys.stderr)  # noqa: T201
                sys.stderr.flush()
                sys.stdout.flush()
        self._linger()
        os._exit(130 if interrupted else RankLostError.exit_code)


def _is_symptom(error: BaseException) -> bool:
    """Tell whether an error says no more than that another process is gone."""
    if isinstance(error, Terminated):
        return True
    named = getattr(distributed, "DistError", RuntimeError)
    if isinstance(error, named) and named is not RuntimeError:
        return True
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _described(error: BaseException) -> str:
    text = _first_line(error)
    return text if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {text}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:500]


def _record(error: BaseException) -> None:
    """Leave the error where torchrun's own report looks for it."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(Exception):
            get_error_handler().record_exception(error)
