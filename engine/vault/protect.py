"""Protect a folder: read, anonymize and seal every image below it.

`protect_folder` lists the sources, prepares keys and output names, and runs the pipeline. Workers
read and seal (`sealing_work`) while this process runs the networks. A run can be resumed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.api import Anonymizer
from engine.distributed.processes import all_gather, from_main, is_main, share
from engine.vault.key_snapshot import KeySnapshot
from engine.vault.keyring import Keyring
from engine.vault.sealed_folder import Manifest, check_apart
from engine.vault.sealing_work import (
    Job,
    Outcome,
    WorkSettings,
    kill_workers,
    make_executor,
    read_batch,
    seal_batch,
)
from engine.vault.sources import SourceImage, list_sources
from engine.vault.subjects import SubjectOf
from modeling.encryption.cipher import quantize_pixels
from modeling.encryption.ised_errors import BadInput, IsedError, StorageError, UsageError
from modeling.encryption.sealed_image import Metadata, check_relative_path
from utils.errors import UserError, worker_death
from utils.files import ensure_folder, remove_leftovers

MAX_BATCH = 64  # the output folder is synced once per batch

Report = Callable[[Outcome], None]


@dataclass(frozen=True)
class ProtectOptions:
    """Names, subjects and speed of a protect run.

    Attributes:
        dataset: Name that output names and subject labels depend on.
        subject_of: Function from a relative path to its subject label.
        batch: Images per batch, 1 to MAX_BATCH.
        workers: Processes that read and seal; 0 does everything in this process.
        overwrite: Replace existing outputs.
    """

    dataset: str
    subject_of: SubjectOf
    batch: int = 32
    workers: int = 2
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError if a number is out of range."""
        if not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"batch is {self.batch}; expected 1 to {MAX_BATCH} images")
        if self.workers < 0:
            raise UsageError(f"workers is {self.workers}; expected 0 or more processes")


@dataclass
class Summary:
    """The counts of a protect run.

    Attributes:
        sealed, present, failed: Numbers of images.
        exif: Number of sealed images whose source had EXIF data, which was not kept.
        exit_code: 0, or the highest exit code of a failure: 1 or 5.
        interrupted: Whether the run was asked to stop.
        digests: SHA-256 (hexadecimal) by name of the outputs that are sealed or present.
    """

    sealed: int = 0
    present: int = 0
    failed: int = 0
    exif: int = 0
    exit_code: int = 0
    interrupted: bool = False
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one image."""
        if outcome.error is not None:
            self.failed += 1
            self.exit_code = max(self.exit_code, outcome.error.exit_code)
            return
        self.sealed += outcome.state == "sealed"
        self.present += outcome.state == "present"
        self.exif += outcome.had_exif
        self.digests[outcome.name] = outcome.digest

    def merge(self, other: Summary) -> None:
        """Add the counts of another process."""
        self.sealed += other.sealed
        self.present += other.present
        self.failed += other.failed
        self.exif += other.exif
        self.exit_code = max(self.exit_code, other.exit_code)
        self.interrupted |= other.interrupted
        self.digests |= other.digests


def protect_folder(
    source: Path,
    target: Path,
    model: Anonymizer,
    keyring: Keyring,
    options: ProtectOptions,
    *,
    report: Report | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Anonymize and seal every image below a folder.

    The same call continues after any interruption: the output name is a function of the input.
    An existing output is opened; source, subject and manifest entry must match.

    With N processes started by torchrun, each process takes every N-th image. Every process returns
    the summary of all; the main process writes the manifest. If one fails, finished files are
    complete, and the same call adds them to the manifest.

    Args:
        source: Folder of images; subfolders are included.
        target: Folder for the sealed files; created if missing.
        model: Anonymizes.
        keyring: Contains the keys. A key is on disk before the first file that is sealed under it.
        options: Names, subjects and speed.
        report: Called with the outcome of every image.
        stop: When set, batches under way are finished and no new ones are started.

    Raises:
        UsageError: The folders overlap.
        StorageError, KeyringError: The run cannot continue; finished files are complete.
    """
    check_apart(source, target, keyring.store.path)
    paths, listed = from_main(lambda: _prepare(source, target, keyring))
    summary = Summary()

    def note(outcome: Outcome) -> None:
        summary.add(outcome)
        if report is not None:
            report(outcome)

    jobs, snapshot = _jobs(share(paths), keyring, options, listed, note)
    settings = WorkSettings(source, target, model.size, snapshot, options.overwrite)
    size, stop = options.batch, stop or threading.Event()
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    key = keyring.manifest_key()
    names = [name for part in all_gather([job.name for job in jobs]) for name in part]
    from_main(lambda: _unlist(target, key, names, overwrite=options.overwrite))
    try:
        _run_pipeline(batches, settings, model, options.workers, report=note, stop=stop)
        summary.interrupted = stop.is_set()
        summary, *others = all_gather(summary)
        for other in others:
            summary.merge(other)
    except BaseException:
        if is_main():
            with suppress(UserError, OSError):  # the original error matters more
                _add_to_manifest(target, key, options.dataset, summary.digests)
        raise
    if is_main():
        _add_to_manifest(target, key, options.dataset, summary.digests)
    return summary


def _prepare(source: Path, target: Path, keyring: Keyring) -> tuple[list[str], Mapping[str, str]]:
    """Create the output folder; return the sources and the files that its manifest lists.

    Loading the manifest fails if the folder belongs to another keyring, before anything is written.
    """
    paths = list_sources(source)
    try:
        ensure_folder(target)
    except UserError as error:
        raise StorageError(str(error)) from None
    remove_leftovers(target)
    return paths, _listed(target, keyring.manifest_key())


def _jobs(
    paths: Sequence[str],
    keyring: Keyring,
    options: ProtectOptions,
    listed: Mapping[str, str],
    report: Report,
) -> tuple[list[Job], KeySnapshot]:
    """Return a job for every path that can be sealed, and the keys; report the other paths."""
    subjects: dict[str, str] = {}
    for path in paths:
        try:
            check_relative_path(path)
            subject = options.subject_of(path)
            keyring.check_subject(subject)
            subjects[path] = subject
        except IsedError as error:
            report(Outcome(path, "", "failed", error=error))
    snapshot = keyring.snapshot(subjects.values())
    key_ids = {
        subject: frozenset(row.key_id for row in keyring.rows_of(subject))
        for subject in set(subjects.values())
    }
    jobs = []
    for path, subject in subjects.items():
        name = keyring.file_name(options.dataset, path)
        try:
            key = snapshot.sealing_key(subject)
            jobs.append(Job(path, name, key, key_ids[subject], listed.get(name)))
        except IsedError as error:
            report(Outcome(path, name, "failed", error=error))
    return jobs, snapshot


def _listed(target: Path, key: bytes) -> Mapping[str, str]:
    """Return the files that the manifest of a folder lists: SHA-256 (hexadecimal) by name."""
    manifest = Manifest.load(target, key)
    return {} if manifest is None else manifest.files


def _unlist(target: Path, key: bytes, names: Sequence[str], *, overwrite: bool) -> None:
    """Remove the files that this run will write from the manifest.

    If the run is killed, its files differ from those that the old manifest lists; the next run
    would reject them as foreign.
    """
    manifest = Manifest.load(target, key)
    if manifest is None:
        return
    rewritten = {name for name in names if overwrite or not (target / name).exists()}
    kept = {name: digest for name, digest in manifest.files.items() if name not in rewritten}
    if len(kept) < len(manifest.files):
        Manifest(manifest.dataset, kept).save(target, key)


def _add_to_manifest(target: Path, key: bytes, dataset: str, digests: dict[str, str]) -> None:
    """Add files to the manifest, which is read again: another run may have changed it."""
    Manifest(dataset, {**_listed(target, key), **digests}).save(target, key)


def _run_pipeline(
    batches: Sequence[Sequence[Job]],
    settings: WorkSettings,
    model: Anonymizer,
    workers: int,
    *,
    report: Report,
    stop: threading.Event,
) -> None:
    """Read, anonymize and seal batches; the three steps overlap.

    Raises:
        StorageError: The disk is full or failing, or a worker process died.
        BadInput: The networks return NaN or infinity.
    """
    executor = make_executor(workers, settings)
    depth = max(1, 2 * workers)
    sealing: deque[Future[list[Outcome]]] = deque()

    def finish_oldest() -> None:
        for outcome in sealing.popleft().result():
            report(outcome)

    try:
        for jobs, results in _read_ahead(executor, batches, depth, stop):
            sources = []
            for job, result in zip(jobs, results, strict=True):
                if isinstance(result, Outcome):
                    report(result)
                else:
                    sources.append((job, result))
            if not sources:
                continue
            items = [
                (job, Metadata(job.path, image.sha256, image.height, image.width), image.had_exif)
                for job, image in sources
            ]
            pixels = _anonymized(model, [image for _, image in sources])
            sealing.append(executor.submit(seal_batch, items, pixels))
            while sealing and (sealing[0].done() or len(sealing) > depth):
                finish_oldest()
        while sealing:
            finish_oldest()
    except BrokenProcessPool:
        kill_workers(executor)
        raise StorageError(worker_death("use fewer --workers")) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _read_ahead(
    executor: Executor, batches: Sequence[Sequence[Job]], depth: int, stop: threading.Event
) -> Iterator[tuple[Sequence[Job], list[SourceImage | Outcome]]]:
    """Yield the batches in order while ``depth`` more are being read; end early after a stop."""
    reading: deque[tuple[Sequence[Job], Future[list[SourceImage | Outcome]]]] = deque()
    for batch in batches:
        if stop.is_set():
            return
        reading.append((batch, executor.submit(read_batch, batch)))
        if len(reading) > depth:
            jobs, future = reading.popleft()
            yield jobs, future.result()
    while reading and not stop.is_set():
        jobs, future = reading.popleft()
        yield jobs, future.result()


def _anonymized(model: Anonymizer, sources: Sequence[SourceImage]) -> NDArray[np.uint8]:
    """Return anonymized images as bytes, uint8 (B, H, W, 3)."""
    pixels = np.stack([source.pixels for source in sources])
    anonymized = model.anonymize_tensor(torch.from_numpy(pixels))
    if not bool(torch.isfinite(anonymized).all()):
        raise BadInput("the anonymizer returns NaN or infinity; the checkpoint is broken")
    return quantize_pixels(anonymized).cpu().numpy()
