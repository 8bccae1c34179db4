"""Batches on their way through a protect run: some being read, one in the networks, some sealed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from numpy.typing import NDArray

from engine.api import Anonymizer
from engine.protecting.sealing_work import (
    Job,
    Outcome,
    Setting,
    kill_workers,
    make_executor,
    read_chunk,
    seal_chunk,
)
from engine.protecting.source_images import SourceImage
from modeling.encryption.errors import BadInput, StorageError
from modeling.encryption.levels import PixelLevels
from modeling.encryption.metadata import Metadata

Report = Callable[[Outcome], None]
_Read = list[SourceImage | Outcome]


def protect_batches(
    batches: Sequence[Sequence[Job]],
    setting: Setting,
    model: Anonymizer,
    workers: int,
    *,
    report: Report,
    stop: threading.Event,
) -> None:
    """Read, anonymize and seal batches, each step beside the others.

    Args:
        batches: What to do.
        setting: What all have in common.
        model: Anonymizes.
        workers: Processes that read and seal; 0 does everything in this one.
        report: Called for every picture.
        stop: When set, what is being sealed is finished and nothing new begun.

    Raises:
        StorageError: The disk is full or failing, or a worker died.
        BadInput: The networks give no numbers.
    """
    executor = make_executor(workers, setting)
    depth = max(1, 2 * workers)
    sealing: deque[Future[list[Outcome]]] = deque()

    def finish_oldest() -> None:
        for outcome in sealing.popleft().result():
            report(outcome)

    try:
        for jobs, results in _read_ahead(executor, batches, depth, stop):
            read = []
            for job, result in zip(jobs, results, strict=True):
                if isinstance(result, Outcome):
                    report(result)
                else:
                    read.append((job, result))
            if not read:
                continue
            items = [(job, _metadata(job, source), source.had_exif) for job, source in read]
            pixels = _anonymized(model, [source for _, source in read])
            sealing.append(executor.submit(seal_chunk, items, pixels))
            while sealing and (sealing[0].done() or len(sealing) > depth):
                finish_oldest()
        while sealing:
            finish_oldest()
    except BrokenProcessPool:
        kill_workers(executor)
        raise StorageError(
            "a worker process died, perhaps for want of memory; use fewer --workers"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    executor: Executor, batches: Sequence[Sequence[Job]], depth: int, stop: threading.Event
) -> Iterator[tuple[Sequence[Job], _Read]]:
    """Yield batches in order as they are read, with ``depth`` more under way; none after a stop."""
    reading: deque[tuple[Sequence[Job], Future[_Read]]] = deque()
    for batch in batches:
        if stop.is_set():
            return
        reading.append((batch, executor.submit(read_chunk, batch)))
        if len(reading) > depth:
            jobs, future = reading.popleft()
            yield jobs, future.result()
    while reading and not stop.is_set():
        jobs, future = reading.popleft()
        yield jobs, future.result()


def _metadata(job: Job, source: SourceImage) -> Metadata:
    return Metadata(job.path, source.sha256, source.height, source.width)


def _anonymized(model: Anonymizer, sources: Sequence[SourceImage]) -> NDArray[np.uint8]:
    """Return anonymized pictures as bytes of kind 1, uint8 (B, H, W, 3)."""
    pixels = np.stack([source.pixels for source in sources])
    anonymized = model.anonymize_tensor(torch.from_numpy(pixels))
    if not bool(torch.isfinite(anonymized).all()):
        raise BadInput("the anonymizer gives NaN or infinity; the checkpoint is broken")
    return PixelLevels().to_pixels(anonymized).cpu().numpy()
