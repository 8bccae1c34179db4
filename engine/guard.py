"""Stopping a run whose losses are NaN or infinite, and saving the batch at fault."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.records import Batch
from engine.distributed.processes import world
from modeling.reid_network import LossDict
from utils.errors import UserError
from utils.files import WriteError
from utils.tensor_files import save_tensors


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite."""

    exit_code = 1


@dataclass(frozen=True)
class _Pending:
    names: tuple[str, ...]
    values: Tensor
    batch: Batch
    step: int
    arrived: torch.cuda.Event | None


class LossGuard:
    """Checks the losses of every step without a synchronisation of host and device.

    On CUDA the losses are copied to the host asynchronously and checked a few steps later, while
    the device still has work queued. The last few batches are kept, so the batch at fault is known.
    On the CPU the losses are checked at once.

    Args:
        folder: Where the batch at fault is saved, as ``nan_batch.pth``.
        depth: On CUDA, how many steps the check may lag behind.
        with_images: Whether the saved batch contains its images.
    """

    def __init__(self, folder: Path, depth: int = 4, *, with_images: bool = True) -> None:
        self._folder = folder
        self._with_images = with_images
        self._depth = depth
        self._pending: deque[_Pending] = deque()

    @torch.no_grad()
    def observe(self, losses: LossDict, batch: Batch, step: int) -> None:
        """Queue the losses of one step, and check the losses that are due.

        Raises:
            NonFiniteLossError: If a loss of a due step is not finite.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        arrived = None
        if values.is_cuda:
            stream = torch.cuda.current_stream(values.device)  # the current GPU may be another one
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        self._pending.append(_Pending(tuple(losses), values, batch, step, arrived))
        self._settle(keep=0 if arrived is None else self._depth)

    def check(self) -> None:
        """Check all queued losses; called before anything is saved.

        Raises:
            NonFiniteLossError: Names the losses and the file of the batch.
        """
        self._settle(keep=0)

    def _settle(self, keep: int) -> None:
        while len(self._pending) > keep:
            due = self._pending.popleft()
            if due.arrived is not None:
                due.arrived.synchronize()
            values = dict(zip(due.names, due.values.tolist(), strict=True))
            bad = {name: value for name, value in values.items() if not math.isfinite(value)}
            if bad:
                self._stop(bad, values, due)

    def _stop(self, bad: dict[str, float], values: dict[str, float], due: _Pending) -> None:
        rank = world().rank  # every process has a part of the batch
        path = self._folder / (f"nan_batch_rank{rank}.pth" if rank else "nan_batch.pth")
        batch = due.batch
        content = {
            "step": due.step,
            "losses": values,
            "label": batch.label.cpu(),
            "index": batch.index.cpu(),
        }
        if self._with_images:
            content |= {"raw": batch.raw.cpu(), "desensitized": batch.desensitized.cpu()}
        try:
            save_tensors(content, path)
            kept = f"its batch is saved in {path}"
        except WriteError as error:
            kept = f"its batch could not be saved ({error})"
        names = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteLossError(
            f"the loss is no longer finite at step {due.step} ({names}); {kept}; the last "
            "checkpoint is unchanged"
        )
