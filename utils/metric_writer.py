"""Let Ctrl-C wait while something runs that must not be left half done.

Numbers over time: TensorBoard for looking, ``metrics.jsonl`` for scripts.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.files import WriteError, ensure_folder, write_text


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


class MetricWriter:
    """Writes scalars and pictures under slash names such as ``loss/triplet`` or ``eval/mAP``.

    Each line of ``metrics.jsonl`` is one call: ``{"epoch": 3, "step": 555, "loss/triplet": 0.41}``.
    A resumed run appends: what an interrupted one wrote beyond the epoch resumed from is dropped
    first, so that no epoch stands there twice.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        resume_epoch: int | None = None,
        resume_step: int | None = None,
    ) -> None:
        """Open ``metrics.jsonl`` and ``runs/`` in a folder.

        Args:
            output_dir: Folder, made if need be.
            resume_epoch: Last finished epoch of the run that is gone on with; later lines are
                dropped. None for a run of its own, which appends to what an earlier one left.
            resume_step: Steps done by then; TensorBoard hides older points beyond them.

        Raises:
            WriteError: The folder or a file in it cannot be written.
        """
        folder = ensure_folder(output_dir)
        self._folder = folder
        path = folder / "metrics.jsonl"
        if resume_epoch is not None:
            drop_later_lines(path, resume_epoch)
        purge_step = None if resume_step is None else resume_step + 1
        with self._guarded():
            _end_with_newline(path)
            # Unbuffered: a line that failed for want of space must not come up again on closing.
            self._lines = path.open("ab", buffering=0)
            self._board = SummaryWriter(str(folder / "runs"), purge_step=purge_step)
        self._thread_hook = threading.excepthook
        threading.excepthook = self._leave_out_tensorboard

    def scalars(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Write numbers of one moment.

        Args:
            values: Slash name to number; a non-finite one becomes null in the file.
            epoch: Epoch it belongs to, from 1.
            step: Training steps done so far, over all epochs.

        Raises:
            WriteError: The device is full.
        """
        record: dict[str, Any] = {"epoch": epoch, "step": step}
        record |= {n: float(v) if math.isfinite(v) else None for n, v in values.items()}
        line = memoryview((json.dumps(record, allow_nan=False) + "\n").encode("utf-8"))
        with self._guarded():
            while line:
                line = line[self._lines.write(line) :]
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def picture(self, name: str, image: Tensor, *, step: int) -> None:
        """Write a picture to TensorBoard: uint8, or float in [0, 1], of shape (3, H, W)."""
        with self._guarded():
            self._board.add_image(name, image, step)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        with self._guarded():
            self._board.flush()

    def close(self) -> None:
        """Write what is left, and close the files."""
        self._lines.close()
        try:
            with self._guarded():
                self._board.close()
        finally:
            threading.excepthook = self._thread_hook

    def _leave_out_tensorboard(self, failure: threading.ExceptHookArgs) -> None:
        """Keep the traceback of TensorBoard's thread off the terminal.

        Its error reaches the next call here, which tells it as one sentence.
        """
        of_tensorboard = type(failure.thread).__module__.startswith("tensorboard")
        if not (of_tensorboard and isinstance(failure.exc_value, OSError)):
            self._thread_hook(failure)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn a failed write into one sentence; TensorBoard's thread shares locks with us."""
        try:
            with interrupts_held():
                yield
        except OSError as error:
            raise WriteError(
                f"cannot write in {self._folder}: {error.strerror or error}; free some space or "
                "choose another OUTPUT_DIR"
            ) from error

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except WriteError:
            if error is None:  # else what went wrong first is what to tell
                raise


class SilentWriter:
    """Takes what :class:`MetricWriter` takes and writes nothing, in processes besides the first."""

    def scalars(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Do nothing."""

    def picture(self, name: str, image: Tensor, *, step: int) -> None:
        """Do nothing."""

    def __enter__(self) -> SilentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    return [record for line in path.read_text("utf-8").splitlines() if (record := _parse(line))]


def drop_later_lines(path: str | Path, epoch: int) -> int:
    """Drop the lines after ``epoch``, and cut or damaged ones; return how many."""
    path = Path(path)
    if not path.is_file():
        return 0
    lines = path.read_text("utf-8", errors="replace").splitlines()
    kept = [line for line in lines if (record := _parse(line)) and record.get("epoch", 0) <= epoch]
    if len(kept) != len(lines):
        write_text(path, "".join(f"{line}\n" for line in kept))
    return len(lines) - len(kept)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _end_with_newline(path: Path) -> None:
    """Finish a line that a kill cut short, lest the next one be glued to it."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
