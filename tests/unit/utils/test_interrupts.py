from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from utils.metric_writer import MetricWriter, interrupts_held, read_metrics


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    signal.getsignal(signal.SIGINT)  # a call, after which Python looks for signals


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        interrupt()
        done.append("all")
    assert done == ["all"]


def test_nothing_is_left_behind() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_held():
        pass
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_an_error_of_the_block_goes_first() -> None:
    with pytest.raises(OSError, match="full"), interrupts_held():
        interrupt()
        raise OSError("full")


def test_a_handler_of_the_program_is_called_too() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with interrupts_held():
            interrupt()
            assert seen == []
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_it() -> None:
    ran = []

    def work() -> None:
        with interrupts_held():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]


def test_an_interrupted_metric_writer_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's queue is never left locked: an interrupt waits until its call is over."""
    written = []

    def add_scalar(self: SummaryWriter, name: str, value: float, step: int) -> None:
        interrupt()
        written.append(name)

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    with pytest.raises(KeyboardInterrupt), MetricWriter(tmp_path) as writer:
        writer.scalars({"a": 1.0, "b": 2.0}, epoch=1, step=1)
    assert written == ["a", "b"]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"epoch": 1, "step": 1, "a": 1.0, "b": 2.0}]
