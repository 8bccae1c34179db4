"""The work of the worker processes of a protect run: read sources, seal and write results.

Workers get the keys of single files only, never a subject's key or the locator key. The module is
free of torch, so that worker processes start quickly.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.vault.sealed_folder import publish
from engine.vault.secret_files import forbid_memory_dumps
from engine.vault.sources import SourceImage, decode_source, read_bytes
from modeling.encryption import png_format
from modeling.encryption.ised_errors import IsedError
from modeling.encryption.sealed_image import FileKey, Metadata, seal_with
from utils.files import sync_folder


@dataclass(frozen=True)
class WorkSettings:
    """The settings that all batches of a run share.

    Attributes:
        source, target: Folders.
        size: Height and width of the networks' images.
        overwrite: Replace outputs that exist already.
    """

    source: Path
    target: Path
    size: tuple[int, int]
    overwrite: bool


@dataclass(frozen=True)
class SealTask:
    """One anonymized image to seal: output name, key of this one file, and metadata."""

    name: str
    key: FileKey
    metadata: Metadata


# Set once in each worker, so that the settings are not sent with every batch.
_settings: list[WorkSettings] = []


def read_batch(sources: Sequence[tuple[str, str]]) -> list[SourceImage | bytes | IsedError]:
    """Read sources, given as path and output name.

    Returns:
        For each source the image at network size. If the output exists already: the SHA-256 of the
        source, for a comparison. If the source cannot be read: the error.
    """
    return [_read(_settings[-1], path, name) for path, name in sources]


def seal_batch(tasks: Sequence[SealTask], pixels: NDArray[np.uint8]) -> list[str | IsedError]:
    """Seal and write anonymized images.

    Args:
        tasks: One for each image.
        pixels: Anonymized images as bytes, uint8 (B, H, W, 3).

    Returns:
        For each image the SHA-256 of the output in hexadecimal, or why it was not written.

    Raises:
        StorageError: The disk is full or failing; the run stops.
    """
    settings = _settings[-1]
    results: list[str | IsedError] = []
    for task, image in zip(tasks, pixels, strict=True):
        content = png_format.encode(seal_with(task.key, image, task.metadata))
        try:
            publish(settings.target / task.name, content, overwrite=settings.overwrite)
        except IsedError as error:
            if error.stops:
                raise
            results.append(error)
        else:
            results.append(hashlib.sha256(content).hexdigest())
    sync_folder(settings.target)
    return results


def make_executor(workers: int, settings: WorkSettings) -> Executor:
    """Return a pool of processes that end with this process, even after kill -9.

    With ``workers`` 0 the executor runs everything in this process.
    """
    if workers == 0:
        _settings[:] = [settings]
        return _InProcess()
    # Not fork: this process has threads and perhaps a GPU. The fork server imports this file once.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, _start_worker, (settings,))


def kill_workers(executor: Executor) -> None:
    """Kill the remaining workers of a broken pool.

    The pool sends SIGTERM, which workers ignore, and would wait for them forever.
    """
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()


class _InProcess(Executor):
    """Runs each call at once, in the calling process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run the call; as in a pool, ``result`` raises its error."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - a pool keeps any error for result()
            future.set_exception(error)
        return future


def _start_worker(settings: WorkSettings) -> None:
    """Keep the settings, ignore signals (the parent handles them), and end with the parent."""
    _settings[:] = [settings]
    forbid_memory_dumps()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent ends; the worker of a killed parent would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _read(settings: WorkSettings, path: str, name: str) -> SourceImage | bytes | IsedError:
    try:
        content = read_bytes(settings.source / path)
        if not settings.overwrite and os.path.lexists(settings.target / name):
            return hashlib.sha256(content).digest()
        return decode_source(content, settings.size, path)
    except IsedError as error:
        return error
