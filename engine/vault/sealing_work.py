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

from engine.vault.reading import original_name
from engine.vault.sealed_folder import publish
from engine.vault.secret_files import forbid_memory_dumps
from engine.vault.sources import SourceImage, decode_source, read_bytes
from modeling.encryption import png_format
from modeling.encryption.ised_errors import BadInput, IsedError
from modeling.encryption.sealed_image import FileKey, Metadata, seal_with
from modeling.encryption.sealed_original import seal_original
from utils.files import sync_folder


@dataclass(frozen=True)
class WorkSettings:
    """The settings that all batches of a run share."""

    source: Path
    target: Path
    size: tuple[int, int]  # height and width of the networks' images
    overwrite: bool  # replace outputs that exist already


@dataclass(frozen=True)
class SealTask:
    """An anonymized image to seal, its source file, or both."""

    name: str  # name of the sealed image
    metadata: Metadata  # metadata of both files
    key: FileKey | None  # key of the one file of the image; None if it exists already
    # key of the one file of the source; None if it is not sealed
    original_key: FileKey | None = None
    # the anonymized image as bytes, uint8 (H, W, 3), if it has a key
    image: NDArray[np.uint8] | None = None


# Set once in each worker, so that the settings are not sent with every batch.
_settings: list[WorkSettings] = []


def read_batch(sources: Sequence[tuple[str, str]]) -> list[SourceImage | bytes | IsedError]:
    """Read sources, given as path and output name.

    Returns:
        For each source the image at network size. If the output exists already: the SHA-256 of the
        source, for a comparison. If the source cannot be read: the error.
    """
    settings, results = _settings[-1], []
    for path, name in sources:
        result: SourceImage | bytes | IsedError
        try:
            content = read_bytes(settings.source / path)
            if not settings.overwrite and os.path.lexists(settings.target / name):
                result = hashlib.sha256(content).digest()
            else:
                result = decode_source(content, settings.size, path)
        except IsedError as error:
            result = error
        results.append(result)
    return results


def seal_batch(tasks: Sequence[SealTask]) -> list[dict[str, str] | IsedError]:
    """Seal and write anonymized images and source files.

    Returns:
        For each task the SHA-256 (hexadecimal) by name of the files, or why it was not completed.

    Raises:
        StorageError: The disk is full or failing; the run stops.
    """
    settings = _settings[-1]
    results: list[dict[str, str] | IsedError] = []
    for task in tasks:
        try:
            results.append(_seal(settings, task))
        except IsedError as error:
            results.append(error.of_one_file())
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


def _seal(settings: WorkSettings, task: SealTask) -> dict[str, str]:
    """Seal and write what a task contains; return the SHA-256 (hexadecimal) by name."""
    digests = {}

    def write(name: str, content: bytes) -> None:
        publish(settings.target / name, content, overwrite=settings.overwrite)
        digests[name] = hashlib.sha256(content).hexdigest()

    # The original comes first: a run that keeps originals leaves no finished image without one.
    if task.original_key is not None:
        source = read_bytes(settings.source / task.metadata.path)  # only one is in memory at a time
        if hashlib.sha256(source).digest() != task.metadata.source_sha256:
            raise BadInput("the file was changed while it was sealed; run the same command again")
        stem = Path(task.name).stem
        content = seal_original(task.original_key, source, task.metadata, stem)
        write(original_name(task.name), content)
    if task.key is not None and task.image is not None:
        write(task.name, png_format.encode(seal_with(task.key, task.image, task.metadata)))
    return digests
