"""The work of the worker processes of a protect run: read sources, seal and write results.

Free of torch, so that worker processes start quickly.
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

from engine.vault.key_snapshot import KeySnapshot
from engine.vault.sealed_folder import publish
from engine.vault.sources import SourceImage, decode_source, read_bytes
from modeling.encryption import png_format
from modeling.encryption.ised_errors import IsedError, OutputExists
from modeling.encryption.keys import SubjectKey
from modeling.encryption.sealed_image import (
    Metadata,
    key_id_of,
    open_image,
    seal_image,
)
from utils.files import sync_folder


@dataclass(frozen=True)
class WorkSettings:
    """The settings that all jobs of a run share.

    Attributes:
        source, target: Folders.
        size: Height and width of the networks' images.
        keys: Open outputs that exist already.
        overwrite: Replace outputs that exist already.
    """

    source: Path
    target: Path
    size: tuple[int, int]
    keys: KeySnapshot
    overwrite: bool


@dataclass(frozen=True)
class Job:
    """One image to protect.

    Attributes:
        path: Source, relative to the source folder.
        name: Name of the output file.
        key: The subject's active key.
        key_ids: All keys of the subject; an existing output must be sealed under one of them.
        listed: SHA-256 (hexadecimal) of the output in the manifest, or None if it is not listed.
    """

    path: str
    name: str
    key: SubjectKey
    key_ids: frozenset[bytes]
    listed: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The result for one image.

    Attributes:
        path: Source, relative to the source folder.
        name: Name of the output file.
        state: ``sealed``, ``present`` (the output existed already) or ``failed``.
        digest: SHA-256 of the output in hexadecimal.
        error: The reason of a failure.
        had_exif: Whether the source had EXIF data, which was not kept.
    """

    path: str
    name: str
    state: str
    digest: str = ""
    error: IsedError | None = None
    had_exif: bool = False


# Set once in each worker, so that the keys are not sent with every batch.
_settings: list[WorkSettings] = []


def read_batch(jobs: Sequence[Job]) -> list[SourceImage | Outcome]:
    """Return each source at network size, or the outcome if it is present already or failed."""
    return [_read(_settings[-1], job) for job in jobs]


def seal_batch(
    items: Sequence[tuple[Job, Metadata, bool]], pixels: NDArray[np.uint8]
) -> list[Outcome]:
    """Seal and write anonymized images.

    Args:
        items: For each image the job, the metadata, and whether the source had EXIF data.
        pixels: Anonymized images as bytes, uint8 (B, H, W, 3).

    Raises:
        StorageError: The disk is full or failing; the run stops.
    """
    settings, outcomes = _settings[-1], []
    for (job, metadata, had_exif), image in zip(items, pixels, strict=True):
        content = png_format.encode(seal_image(job.key, image, metadata))
        try:
            publish(settings.target / job.name, content, overwrite=settings.overwrite)
        except OutputExists as error:  # another run has written it in the meantime
            outcomes.append(Outcome(job.path, job.name, "failed", error=error))
            continue
        digest = hashlib.sha256(content).hexdigest()
        outcomes.append(Outcome(job.path, job.name, "sealed", digest, had_exif=had_exif))
    sync_folder(settings.target)
    return outcomes


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent ends; the worker of a killed parent would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _read(settings: WorkSettings, job: Job) -> SourceImage | Outcome:
    """Return the source of a job, or the outcome if the output exists or reading fails."""
    try:
        content = read_bytes(settings.source / job.path)
        output = settings.target / job.name
        if not settings.overwrite and os.path.lexists(output):
            return _present(settings, job, output, hashlib.sha256(content).digest())
        return decode_source(content, settings.size)
    except IsedError as error:
        return Outcome(job.path, job.name, "failed", error=error)


def _present(settings: WorkSettings, job: Job, output: Path, source_sha256: bytes) -> Outcome:
    """Return the outcome for an output that exists and is this job's.

    Raises:
        OutputExists: It does not open, was made from another source, was sealed for another
            subject (whose erasure would erase it too), or is not the file that the manifest lists.
    """
    try:
        content = png_format.read_content(output)
        sealed = png_format.decode(content)
        opened = open_image(settings.keys.opening_key(sealed.chunk), sealed)
    except (IsedError, OSError) as error:
        raise OutputExists(
            f"{output} exists and does not open ({type(error).__name__}); it was kept, "
            "--overwrite replaces it"
        ) from None
    digest, problem = hashlib.sha256(content).hexdigest(), ""
    if (opened.metadata.path, opened.metadata.source_sha256) != (job.path, source_sha256):
        problem = f"was made from another version of {job.path}"
    elif key_id_of(sealed.chunk, job.key.locator_key) not in job.key_ids:
        problem = "was sealed for another subject"
    elif job.listed not in (None, digest):
        problem = "is not the file that the manifest lists: it was put there from elsewhere"
    if problem:
        raise OutputExists(f"{output} exists and {problem}; it was kept, --overwrite replaces it")
    return Outcome(job.path, job.name, "present", digest)
