"""Protect a folder: read, anonymize and seal every image below it.

`protect_folder` prepares keys and output names and runs the pipeline. Worker processes read and
seal (`sealing_work`) while this process runs the networks and looks up keys. A run can be resumed.
"""

from __future__ import annotations

import os
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
from engine.vault.existing import ExistingOutputs
from engine.vault.index import IndexWriter, embeddings
from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import ORIGINAL
from engine.vault.originals import original_name
from engine.vault.sealed_folder import add_to_manifest, check_apart, listed_files, unlist
from engine.vault.sealing_work import (
    SealTask,
    WorkSettings,
    kill_workers,
    make_executor,
    read_batch,
    seal_batch,
)
from engine.vault.sources import SourceFolder, SourceImage
from engine.vault.subjects import SubjectOf, check_dataset
from modeling.encryption.cipher import dequantize_pixels, quantize_pixels
from modeling.encryption.ised_errors import BadInput, IsedError, StorageError, UsageError
from modeling.encryption.sealed_image import Metadata, check_relative_path, new_file_key
from utils.errors import UserError, worker_death
from utils.files import ensure_folder, remove_leftovers

MAX_BATCH = 64  # the output folder is synced once per batch


@dataclass(frozen=True)
class Outcome:
    """The result for one entry of the source folder."""

    path: str
    state: str  # `sealed`, `present` (the output existed already) or `failed`
    name: str = ""  # name of the output file
    # SHA-256 (hexadecimal) by name of the output and of the sealed source file
    digests: Mapping[str, str] = field(default_factory=dict)
    sealed_original: bool = False  # this run sealed the source file
    error: IsedError | None = None  # the reason of a failure
    had_exif: bool = False  # the source had EXIF data, which was not kept


Report = Callable[[Outcome], None]


@dataclass(frozen=True)
class ProtectOptions:
    """Names, subjects and speed of a protect run."""

    dataset: str  # name that output names and subject labels depend on
    subject_of: SubjectOf  # function from a relative path to its subject label
    batch: int = 32  # images per batch, 1 to MAX_BATCH
    workers: int = 2  # processes that read and seal; 0 does everything in this process
    overwrite: bool = False  # replace existing outputs
    # also seal the source files, each under its subject's key for originals
    keep_original: bool = False
    index: bool = True  # also write the embeddings of sealed images to the index, for `search`

    def __post_init__(self) -> None:
        """Raise UsageError if the data set name is not allowed or a number is out of range."""
        check_dataset(self.dataset)
        if not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"batch is {self.batch}; expected 1 to {MAX_BATCH} images")
        if self.workers < 0:
            raise UsageError(f"workers is {self.workers}; expected 0 or more processes")


@dataclass
class Summary:
    """The counts of a protect run. Every entry of the source folder is counted exactly once."""

    sealed: int = 0
    present: int = 0
    failed: int = 0
    left_out: int = 0  # files that are not images
    not_reached: int = 0  # images that an interrupted run did not reach
    originals: int = 0  # source files that were sealed
    exif: int = 0  # sealed images whose source had EXIF data, which was not kept
    exit_code: int = 0  # highest exit code of a failure: 1 or 5
    interrupted: bool = False  # the run was asked to stop
    # SHA-256 (hexadecimal) by name of the outputs that are sealed or present
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        if outcome.error is not None:
            self.failed += 1
            self.exit_code = max(self.exit_code, outcome.error.exit_code)
            return
        self.sealed += outcome.state == "sealed"
        self.present += outcome.state == "present"
        self.originals += outcome.sealed_original
        self.exif += outcome.had_exif
        self.digests |= outcome.digests

    def merge(self, other: Summary) -> None:
        """Add the counts of another process."""
        self.sealed += other.sealed
        self.present += other.present
        self.failed += other.failed
        self.originals += other.originals
        self.exif += other.exif
        self.exit_code = max(self.exit_code, other.exit_code)
        self.interrupted |= other.interrupted
        self.digests |= other.digests


@dataclass(frozen=True)
class _Job:
    """One image: path of the source, name of the output, and subject label."""

    path: str
    name: str
    subject: str


def protect_folder(
    source: SourceFolder,
    target: Path,
    model: Anonymizer,
    keyring: Keyring,
    options: ProtectOptions,
    *,
    report: Report | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Anonymize and seal every image of a folder.

    Images are sealed in the order of their output names, which are keyed hashes of their paths.
    The order of the files on a disk or in an archive therefore reveals nothing about subjects.

    The same call continues after any interruption: the output name is a function of the input.
    An existing output is opened; source, subject and manifest entry must match.
    With ``keep_original``, a missing sealed source file is added to a sealed image that exists.

    With N processes started by torchrun, each process takes every N-th image. Every process returns
    the summary of all; the main process writes the manifest. If one fails, finished files are
    complete, and the same call adds them to the manifest.

    Args:
        source: Folder of images; the list of the main process is used.
        target: Folder for the sealed files; created if missing.
        model: Anonymizes.
        keyring: Contains the keys. A key is on disk before the first file that is sealed under it.
        options: Names, subjects and speed.
        report: Called with every outcome.
        stop: When set, batches under way are finished and no new ones are started.

    Raises:
        UsageError: The folders overlap.
        StorageError, KeyringError: The run cannot continue; finished files are complete.
    """
    check_apart(source.root, target, keyring.store.path)
    source, listed = from_main(lambda: (source, _prepare(target, keyring)))
    summary, stop = Summary(), stop or threading.Event()

    def note(outcome: Outcome) -> None:
        summary.add(outcome)
        if report is not None:
            report(outcome)

    if is_main():
        for path, problem in source.failed.items():
            note(Outcome(path, "failed", error=problem))
    jobs = _jobs(source.images, keyring, options, note)
    key = keyring.manifest_key()
    names = [name for part in all_gather([job.name for job in jobs]) for name in part]
    if options.keep_original:
        names += [original_name(name) for name in names]
    elif options.overwrite:  # not replaced: see ExistingOutputs.check_no_original
        names = [name for name in names if not os.path.lexists(target / original_name(name))]
    from_main(lambda: unlist(target, key, names, overwrite=options.overwrite))
    pipeline = _Pipeline(source.root, target, model, keyring, options, listed, note)
    try:
        pipeline.run(jobs, stop)
        summary.interrupted = stop.is_set()
        summary, *others = all_gather(summary)
        for other in others:
            summary.merge(other)
    except BaseException:
        if is_main():
            with suppress(UserError, OSError):  # the original error matters more
                add_to_manifest(target, key, options.dataset, summary.digests)
        raise
    if is_main():
        add_to_manifest(target, key, options.dataset, summary.digests)
    summary.left_out = len(source.left_out)
    finished = summary.sealed + summary.present + summary.failed
    summary.not_reached = len(source.images) + len(source.failed) - finished
    return summary


def _prepare(target: Path, keyring: Keyring) -> Mapping[str, str]:
    """Create the output folder; return the files that its manifest lists.

    Loading the manifest fails if the folder belongs to another keyring, before anything is written.
    """
    try:
        ensure_folder(target)
    except UserError as error:
        raise StorageError(str(error)) from None
    remove_leftovers(target)
    return listed_files(target, keyring.manifest_key())


def _jobs(
    paths: Sequence[str], keyring: Keyring, options: ProtectOptions, report: Report
) -> list[_Job]:
    """Return this process's jobs in the order of output names; report paths that have none."""
    names: dict[str, str] = {}
    for path in paths:
        try:
            check_relative_path(path)
            names[keyring.file_name(options.dataset, path)] = path
        except IsedError as error:
            if is_main():
                report(Outcome(path, "failed", error=error))
    jobs = []
    for name in share(sorted(names)):
        path = names[name]
        try:
            job = _Job(path, name, options.subject_of(path))
            keyring.check_subject(job.subject)
            jobs.append(job)
        except IsedError as error:
            report(Outcome(path, "failed", error=error))
    return jobs


_Read = list[SourceImage | bytes | IsedError]
_Sealed = list[dict[str, str] | IsedError]


@dataclass(frozen=True)
class _Item:
    """One image to complete."""

    job: _Job
    task: SealTask  # what a worker seals
    source: SourceImage | None  # the source at network size; None if the sealed image exists
    present: Mapping[str, str]  # SHA-256 (hexadecimal) by name of the outputs that exist already
    key_id: bytes  # id of the key that seals the image; empty if the sealed image exists


# The items of a batch, the embeddings of their images by output name, and the sealing.
_Batch = tuple[list[_Item], Mapping[str, NDArray[np.float16]], Future[_Sealed]]


class _Pipeline:
    """Reads, anonymizes and seals batches; the three steps overlap."""

    def __init__(
        self,
        source: Path,
        target: Path,
        model: Anonymizer,
        keyring: Keyring,
        options: ProtectOptions,
        listed: Mapping[str, str],
        report: Report,
    ) -> None:
        """Start no process yet; see `run`."""
        self._settings = WorkSettings(source, target, model.size, options.overwrite)
        self._model, self._keyring, self._options = model, keyring, options
        self._existing, self._report = ExistingOutputs(target, keyring, listed), report
        self._depth = max(1, 2 * options.workers)
        self._sealing: deque[_Batch] = deque()
        self._index: IndexWriter | None = None
        if options.index:
            self._index = IndexWriter(target, keyring, model.embedding_digest)

    def run(self, jobs: Sequence[_Job], stop: threading.Event) -> None:
        """Protect the images of all jobs, or of the batches under way when ``stop`` is set.

        Raises:
            StorageError: The disk is full or failing, or a worker process died.
            BadInput: The networks return NaN or infinity.
        """
        self._prepare_keys(jobs)
        executor = make_executor(self._options.workers, self._settings)
        try:
            for batch, results in self._read_ahead(executor, jobs, stop):
                items = self._items_to_seal(batch, results)
                if items:
                    self._submit(executor, items)
                while self._sealing and (
                    self._sealing[0][-1].done() or len(self._sealing) > self._depth
                ):
                    self._finish_oldest()
            while self._sealing:
                self._finish_oldest()
            if self._index is not None:
                self._index.flush()
        except BrokenProcessPool:
            kill_workers(executor)
            raise StorageError(worker_death("use fewer --workers")) from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(
        self, executor: Executor, jobs: Sequence[_Job], stop: threading.Event
    ) -> Iterator[tuple[Sequence[_Job], _Read]]:
        """Yield the batches in order while others are being read; end early after a stop."""
        reading: deque[tuple[Sequence[_Job], Future[_Read]]] = deque()
        size = self._options.batch
        for start in range(0, len(jobs), size):
            if stop.is_set():
                return
            batch = jobs[start : start + size]
            sources = [(job.path, job.name) for job in batch]
            reading.append((batch, executor.submit(read_batch, sources)))
            if len(reading) > self._depth:
                batch, future = reading.popleft()
                yield batch, future.result()
        while reading and not stop.is_set():
            batch, future = reading.popleft()
            yield batch, future.result()

    def _prepare_keys(self, jobs: Sequence[_Job]) -> None:
        """Create the keys of jobs and store their use, in one transaction for each purpose.

        After each write of a process, the other processes of a run read the whole keyring again.
        """
        self._keyring.ensure(job.subject for job in jobs if self._lacks_image(job))
        self._keyring.ensure((job.subject for job in jobs if self._lacks_original(job)), ORIGINAL)

    def _items_to_seal(self, jobs: Sequence[_Job], results: _Read) -> list[_Item]:
        """Return what is to be sealed, with keys; report the other jobs."""
        self._prepare_keys(jobs)  # a new day may have begun
        items = []
        for job, result in zip(jobs, results, strict=True):
            try:
                if isinstance(result, IsedError):
                    raise result
                item = self._item(job, result)
            except IsedError as error:
                if error.stops:
                    raise
                self._report(Outcome(job.path, "failed", job.name, error=error))
            else:
                if item.task.key is None and item.task.original_key is None:
                    self._report_done(item, {})
                else:
                    items.append(item)
        return items

    def _item(self, job: _Job, source: SourceImage | bytes) -> _Item:
        """Return what is to be sealed of an image.

        Args:
            job: The image.
            source: The source at network size, or its SHA-256 if the sealed image exists.

        Raises:
            OutputExists: An existing output is not that of this source and subject.
            RevokedKey, DestroyedKey: The subject's keys were revoked or destroyed.
        """
        key, key_id, original_key, present = None, b"", None, {}
        if isinstance(source, bytes):
            metadata, present[job.name] = self._existing.image(
                job.name, job.subject, job.path, source
            )
        else:
            metadata = Metadata(job.path, source.sha256, source.height, source.width)
            subject_key = self._keyring.sealing_key(job.subject)
            key, key_id = new_file_key(subject_key), subject_key.key_id
        if self._lacks_original(job):
            original_key = new_file_key(self._keyring.sealing_key(job.subject, ORIGINAL))
        elif self._options.keep_original:
            name = original_name(job.name)
            present[name] = self._existing.original(name, job.subject, metadata)
        elif key is not None:
            self._existing.check_no_original(original_name(job.name))
        task = SealTask(job.name, metadata, key, original_key)
        image = source if isinstance(source, SourceImage) else None
        return _Item(job, task, image, present, key_id)

    def _lacks_image(self, job: _Job) -> bool:
        """Return whether an image is to be sealed."""
        return self._settings.overwrite or not os.path.lexists(self._settings.target / job.name)

    def _lacks_original(self, job: _Job) -> bool:
        """Return whether the source file of an image is to be sealed."""
        if not self._options.keep_original:
            return False
        output = self._settings.target / original_name(job.name)
        return self._options.overwrite or not os.path.lexists(output)

    def _submit(self, executor: Executor, items: list[_Item]) -> None:
        """Anonymize images and let a worker seal them, and source files."""
        images: list[NDArray[np.uint8] | None] = [None] * len(items)
        sources = {index: item.source for index, item in enumerate(items) if item.source}
        if sources:
            pixels = torch.from_numpy(np.stack([source.pixels for source in sources.values()]))
            anonymized = self._model.anonymize_tensor(pixels)
            if not bool(torch.isfinite(anonymized).all()):
                raise BadInput("the anonymizer returns NaN or infinity; the checkpoint is broken")
            levels = quantize_pixels(anonymized)
            for index, image in zip(sources, levels.cpu().numpy(), strict=True):
                images[index] = image
        future = executor.submit(seal_batch, [item.task for item in items], images)
        vectors = {}
        if sources and self._index is not None:  # of the rounded images, while workers seal them
            names = (items[index].job.name for index in sources)
            images_of_batch = dequantize_pixels(levels)
            vectors = dict(zip(names, embeddings(self._model, images_of_batch), strict=True))
        self._sealing.append((items, vectors, future))

    def _finish_oldest(self) -> None:
        """Wait for the oldest batch that is being sealed, and report its images."""
        items, vectors, future = self._sealing.popleft()
        for item, result in zip(items, future.result(), strict=True):
            if isinstance(result, IsedError):
                self._report(Outcome(item.job.path, "failed", item.job.name, error=result))
                continue
            if item.job.name in vectors:
                self._add_vector(item, result[item.job.name], vectors[item.job.name])
            self._report_done(item, result)

    def _add_vector(self, item: _Item, digest: str, vector: NDArray[np.float16]) -> None:
        """Add an embedding to the index, unless the key was revoked or destroyed meanwhile."""
        if self._index is None:
            return
        try:
            self._index.add(item.key_id, bytes.fromhex(digest), vector)
        except IsedError as error:
            if error.stops:
                raise

    def _report_done(self, item: _Item, sealed: Mapping[str, str]) -> None:
        """Report an image that is complete, with the SHA-256 by name of files just sealed."""
        job, digests = item.job, {**item.present, **sealed}
        state = "sealed" if job.name in sealed else "present"
        had_exif = item.source is not None and item.source.had_exif
        kept = original_name(job.name) in sealed
        self._report(Outcome(job.path, state, job.name, digests, kept, had_exif=had_exif))
