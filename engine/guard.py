"""Stop a run whose losses are no longer numbers, and keep the batch that did it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.records import Batch
from engine.checkpoint import save_file
from engine.distributed.processes import world
from modeling.reid_network import LossDict
from utils.errors import UserError
from utils.files import WriteError


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
    """Looks at the losses of every step without making the device wait.

    On CUDA the values travel to the host behind the step that made them and are read a few steps
    later, when the device still has work queued; so the batch at fault is known exactly, and the
    price is keeping the last few batches. On the CPU they are read at once.

    Args:
        folder: Where the bad batch is saved, as ``nan_batch.pth``.
        depth: How many steps the host may be ahead of the check on CUDA.
    """

    def __init__(self, folder: Path, depth: int = 4) -> None:
        self._folder = folder
        self._depth = depth
        self._pending: deque[_Pending] = deque()

    @torch.no_grad()
    def observe(self, losses: LossDict, batch: Batch, step: int) -> None:
        """Queue the losses of one step, and check those that are due.

        Raises:
            NonFiniteLossError: If a loss of a due step is not finite.
        """
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        arrived = None
        if values.is_cuda:
            stream = torch.cuda.current_stream(values.device)  # not that of another, current GPU
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        self._pending.append(_Pending(tuple(losses), values, batch, step, arrived))
        self._settle(keep=0 if arrived is None else self._depth)

    def check(self) -> None:
        """Check everything queued; called before anything is saved.

        Raises:
            NonFiniteLossError: Names the losses and says where the batch is.
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
            "raw": batch.raw.cpu(),
            "desensitized": batch.desensitized.cpu(),
            "label": batch.label.cpu(),
            "index": batch.index.cpu(),
        }
        try:
            save_file(content, path)
            kept = f"its batch is saved in {path}"
        except WriteError as error:
            kept = f"its batch could not be saved ({error})"
        names = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise NonFiniteLossError(
            f"the loss is no longer finite at step {due.step} ({names}); {kept}; the "
            "last checkpoint is untouched: lower SOLVER.BASE_LR or set "
            "RUNTIME.PRECISION float32, then continue with SOLVER.RESUME True"
        )
