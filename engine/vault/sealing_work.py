"""What worker processes of a protect run do: read sources, and seal and write results."""

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
from engine.vault.secret_files import sync_folder
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


@dataclass(frozen=True)
class Setting:
    """What every job of a run has in common.

    Attributes:
        source, target: Folders.
        size: Height and width of the networks' images.
        keys: To look into outputs that are there already.
        overwrite: Replace outputs that are there.
    """

    source: Path
    target: Path
    size: tuple[int, int]
    keys: KeySnapshot
    overwrite: bool


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        path: Below the source.
        name: Output name.
        key: Its subject's key to seal with.
        key_ids: All keys of its subject, of which one sealed the output if that is there.
        listed: SHA-256 in hexadecimal of the output as the manifest lists it, if it does.
    """

    path: str
    name: str
    key: SubjectKey
    key_ids: frozenset[bytes]
    listed: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one picture.

    Attributes:
        path: Below the source.
        name: Output name.
        state: ``sealed``, ``kept`` (it was there already) or ``failed``.
        digest: SHA-256 of the output in hexadecimal.
        error: Why it failed.
        had_exif: Whether EXIF data was left behind.
    """

    path: str
    name: str
    state: str
    digest: str = ""
    error: IsedError | None = None
    had_exif: bool = False


# Set once in each worker: the keys travel once, not with every batch.
_setting: list[Setting] = []


def read_chunk(jobs: Sequence[Job]) -> list[SourceImage | Outcome]:
    """Read and resize sources; those that are done already, or fail, come back as outcomes."""
    return [_read(_setting[-1], job) for job in jobs]


def seal_chunk(
    items: Sequence[tuple[Job, Metadata, bool]], pixels: NDArray[np.uint8]
) -> list[Outcome]:
    """Seal and write anonymized pictures.

    Args:
        items: Job, metadata and whether there was EXIF data, for each picture.
        pixels: The anonymized pictures as bytes of kind 1, uint8 (B, H, W, 3).

    Raises:
        StorageError: The disk is full or failing: the run stops.
    """
    setting, outcomes = _setting[-1], []
    for (job, metadata, had_exif), picture in zip(items, pixels, strict=True):
        content = png_format.encode(seal_image(job.key, picture, metadata))
        try:
            publish(setting.target / job.name, content, overwrite=setting.overwrite)
        except OutputExists as error:  # another run was quicker
            outcomes.append(Outcome(job.path, job.name, "failed", error=error))
            continue
        digest = hashlib.sha256(content).hexdigest()
        outcomes.append(Outcome(job.path, job.name, "sealed", digest, had_exif=had_exif))
    sync_folder(setting.target)
    return outcomes


def make_executor(workers: int, setting: Setting) -> Executor:
    """Return processes that end with this one, even if it is killed; 0 works in this process."""
    if workers == 0:
        _setting[:] = [setting]
        return _InProcess()
    # Not fork: the parent has threads and perhaps a GPU. The fork server imports this file once.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, _start_worker, (setting,))


def kill_workers(executor: Executor) -> None:
    """End what is left of a broken pool.

    The pool itself asks them with SIGTERM and then waits; they ignore it, so it would for ever.
    """
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()


class _InProcess(Executor):
    """Runs everything at once where it is submitted."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run now; errors are kept for ``result`` as in a real pool."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - a pool keeps any error for result()
            future.set_exception(error)
        return future


def _start_worker(setting: Setting) -> None:
    """Keep the setting, leave signals to the parent, and end when it does."""
    _setting[:] = [setting]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's end: a pool whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _read(setting: Setting, job: Job) -> SourceImage | Outcome:
    """Read one source unless its output is there."""
    try:
        content = read_bytes(setting.source / job.path)
        output = setting.target / job.name
        if not setting.overwrite and os.path.lexists(output):
            return _kept(setting, job, output, hashlib.sha256(content).digest())
        return decode_source(content, setting.size)
    except IsedError as error:
        return Outcome(job.path, job.name, "failed", error=error)


def _kept(setting: Setting, job: Job, output: Path, source_sha256: bytes) -> Outcome:
    """Look into an output that is there.

    Raises:
        OutputExists: It does not open, was made from another source or for another subject, whose
            erasure it would follow, or was put there in place of the one of the manifest.
    """
    try:
        content = png_format.read_content(output)
        sealed = png_format.decode(content)
        opened = open_image(setting.keys.opening_key(sealed.chunk), sealed)
    except (IsedError, OSError) as error:
        raise OutputExists(
            f"{output} exists and does not open ({type(error).__name__}); it was kept, "
            "--overwrite replaces it"
        ) from None
    digest, other = hashlib.sha256(content).hexdigest(), ""
    if (opened.metadata.path, opened.metadata.source_sha256) != (job.path, source_sha256):
        other = f"was made from another version of {job.path}"
    elif key_id_of(sealed.chunk, job.key.locator_key) not in job.key_ids:
        other = "was sealed for another subject"
    elif job.listed not in (None, digest):
        other = "is not the manifest's file of that name: it was put there from elsewhere"
    if other:
        raise OutputExists(f"{output} exists and {other}; it was kept, --overwrite replaces it")
    return Outcome(job.path, job.name, "kept", digest)
