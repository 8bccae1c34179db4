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
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.api import Anonymizer
from engine.distributed.processes import all_gather, from_main, is_main, share
from engine.vault.index import IndexWriter, embeddings
from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import ORIGINAL
from engine.vault.reading import check_existing, check_no_original, digest_of, original_name
from engine.vault.sealed_folder import Manifest, check_apart, unlist
from engine.vault.sealing_work import (
    SealTask,
    WorkSettings,
    kill_workers,
    make_executor,
    read_batch,
    seal_batch,
)
from engine.vault.sources import SourceFolder, SourceImage
from engine.vault.subjects import SubjectOf
from modeling.encryption.cipher import dequantize_pixels, quantize_pixels
from modeling.encryption.ised_errors import BadInput, IsedError, StorageError
from modeling.encryption.sealed_image import Metadata, check_relative_path, new_file_key
from utils.errors import UserError, worker_death
from utils.files import ensure_folder, remove_leftovers

MAX_BATCH = 64  # the output folder is synced once per batch


Report = Callable[[str, IsedError | None], None]  # of a relative path, and why it failed


@dataclass(frozen=True)
class ProtectOptions:
    """Names, subjects and speed of a protect run."""

    dataset: str  # name that output names and subject labels depend on, see `check_dataset`
    subject_of: SubjectOf  # function from a relative path to its subject label
    batch: int = 32  # images per batch, 1 to MAX_BATCH
    workers: int = 2  # processes that read and seal; 0 does everything in this process
    overwrite: bool = False  # replace existing outputs
    # also seal the source files, each under its subject's key for originals
    keep_original: bool = False
    index: bool = True  # also write the embeddings of sealed images to the index, for `search`


@dataclass
class Summary:
    """The counts of a protect run. Every entry of the source folder is counted exactly once."""

    sealed: int = 0
    present: int = 0  # images whose output existed already
    failed: int = 0
    left_out: int = 0  # files that are not images
    not_reached: int = 0  # images that an interrupted run did not reach
    originals: int = 0  # source files that were sealed
    exif: int = 0  # sealed images whose source had EXIF data, which was not kept
    exit_code: int = 0  # highest exit code of a failure: 1 or 5
    interrupted: bool = False  # the run was asked to stop
    # SHA-256 (hexadecimal) by name of the outputs that are sealed or present
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, other: Summary) -> None:
        """Add the counts of another process."""
        for name in ("sealed", "present", "failed", "originals", "exif"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
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

    With N processes started by torchrun, each process takes every N-th image of the main process's
    list. Every process returns the summary of all; the main process writes the manifest. If one
    fails, finished files are complete, and the same call adds them to the manifest.

    A key is on disk before the first file that is sealed under it. ``report`` is called with every
    image and its error, if it has one. When ``stop`` is set, batches under way are finished and no
    new ones are started.

    The caller holds the lock of the output folder.

    Raises:
        UsageError: The folders overlap.
        StorageError, KeyringError: The run cannot continue; finished files are complete.
    """
    check_apart(source.root, target, keyring.store.path)
    source, before = from_main(lambda: (source, _prepare(target, keyring, options.dataset)))
    summary, stop = Summary(), stop or threading.Event()

    def note(path: str, error: IsedError | None) -> None:
        if error is not None:
            summary.failed += 1
            summary.exit_code = max(summary.exit_code, error.exit_code)
        if report is not None:
            report(path, error)

    if is_main():
        for path, problem in source.failed.items():
            note(path, problem)
    jobs = _jobs(source.images, keyring, options, note)
    key = keyring.manifest_key()
    names = [name for part in all_gather([job.name for job in jobs]) for name in part]
    if options.keep_original:
        names += [original_name(name) for name in names]
    elif options.overwrite:  # not replaced: see `check_no_original`
        names = [name for name in names if not os.path.lexists(target / original_name(name))]
    kept = from_main(lambda: unlist(target, key, before, names, overwrite=options.overwrite))
    settings = WorkSettings(source.root, target, model.size, options.overwrite)
    pipeline = _Pipeline(settings, model, keyring, options, before.files, summary, note)
    try:
        pipeline.run(jobs, stop)
        summary.interrupted = stop.is_set()
        summary, *others = all_gather(summary)
        for other in others:
            summary.add(other)
    except BaseException:
        if is_main():
            with suppress(UserError, OSError):  # the original error matters more
                Manifest(options.dataset, {**kept.files, **summary.digests}).save(target, key)
        raise
    if is_main():
        files = {**kept.files, **summary.digests}
        # After an interrupt this could take minutes, and the same command replaces the files.
        same = {} if summary.interrupted else _unchanged(target, before.files, files)
        Manifest(options.dataset, {**files, **same}).save(target, key)
    summary.left_out = len(source.left_out)
    finished = summary.sealed + summary.present + summary.failed
    summary.not_reached = len(source.images) + len(source.failed) - finished
    return summary


def _prepare(target: Path, keyring: Keyring, dataset: str) -> Manifest:
    """Create the output folder; return its manifest, or an empty one.

    Loading the manifest fails if the folder belongs to another keyring, before anything is written.
    """
    try:
        ensure_folder(target)
    except UserError as error:
        raise StorageError(str(error)) from None
    remove_leftovers(target)
    return Manifest.load(target, keyring.manifest_key()) or Manifest(dataset)


def _unchanged(
    folder: Path, before: Mapping[str, str], now: Mapping[str, str]
) -> Mapping[str, str]:
    """Return the files that were listed before, are not listed now, and are the same files."""
    same = {}
    for name in before.keys() - now.keys():
        with suppress(IsedError):
            if digest_of(folder / name) == before[name]:
                same[name] = before[name]
    return same


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
                report(path, error)
    jobs = []
    for name in share(sorted(names)):
        path = names[name]
        try:
            job = _Job(path, name, options.subject_of(path))
            keyring.check_subject(job.subject)
            jobs.append(job)
        except IsedError as error:
            report(path, error)
    return jobs


_Read = list[SourceImage | bytes | IsedError]
_Sealed = list[dict[str, str] | IsedError]


@dataclass(frozen=True)
class _Item:
    """One image to complete."""

    task: SealTask  # what a worker seals
    source: SourceImage | None  # the source at network size; None if the sealed image exists
    present: Mapping[str, str]  # SHA-256 (hexadecimal) by name of the outputs that exist already
    key_id: bytes  # id of the key that seals the image; empty if the sealed image exists


# The items of a batch, the embeddings of their images by output name, and the sealing.
_Batch = tuple[list[_Item], Mapping[str, NDArray[np.float16]], Future[_Sealed]]


@dataclass
class _Pipeline:
    """Reads, anonymizes and seals batches; the three steps overlap."""

    _settings: WorkSettings
    _model: Anonymizer
    _keyring: Keyring
    _options: ProtectOptions
    _listed: Mapping[str, str]  # SHA-256 (hexadecimal) by name of the files in the manifest
    _summary: Summary  # counts the images that are complete
    _report: Report

    def __post_init__(self) -> None:
        self._depth = max(1, 2 * self._options.workers)
        self._sealing: deque[_Batch] = deque()
        self._index: IndexWriter | None = None
        if self._options.index:
            network = self._model.embedding_digest
            self._index = IndexWriter(self._settings.target, self._keyring, network)

    def run(self, jobs: Sequence[_Job], stop: threading.Event) -> None:
        """Protect the images of all jobs, or of the batches under way when ``stop`` is set."""
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
        self._keyring.ensure(job.subject for job in jobs if self._lacks(job.name))
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
                self._report(job.path, error.of_one_file())
            else:
                if item.task.key is None and item.task.original_key is None:
                    self._report_done(item, {})
                else:
                    items.append(item)
        return items

    def _item(self, job: _Job, source: SourceImage | bytes) -> _Item:
        """Return what is to be sealed of an image.

        ``source`` is the source at network size, or its SHA-256 if the sealed image exists.
        """
        key, key_id, original_key, present = None, b"", None, {}
        name, keyring = original_name(job.name), self._keyring
        target = self._settings.target
        digest = source if isinstance(source, bytes) else source.sha256

        def existing(output: str) -> Metadata:
            metadata, present[output] = check_existing(
                target / output, (job.path, digest), job.subject, keyring, self._listed
            )
            return metadata

        if isinstance(source, bytes):
            metadata = existing(job.name)
        else:
            metadata = Metadata(job.path, source.sha256, source.height, source.width)
            subject_key = keyring.sealing_key(job.subject)
            key, key_id = new_file_key(subject_key), subject_key.key_id
        if self._lacks_original(job):
            original_key = new_file_key(keyring.sealing_key(job.subject, ORIGINAL))
        elif self._options.keep_original:
            existing(name)
        elif key is not None:
            check_no_original(target / name)
        task = SealTask(job.name, metadata, key, original_key)
        image = source if isinstance(source, SourceImage) else None
        return _Item(task, image, present, key_id)

    def _lacks(self, name: str) -> bool:
        return self._settings.overwrite or not os.path.lexists(self._settings.target / name)

    def _lacks_original(self, job: _Job) -> bool:
        return self._options.keep_original and self._lacks(original_name(job.name))

    def _submit(self, executor: Executor, items: list[_Item]) -> None:
        """Anonymize images and let a worker seal them, and source files."""
        tasks = [item.task for item in items]
        sources = {index: item.source for index, item in enumerate(items) if item.source}
        if sources:
            pixels = torch.from_numpy(np.stack([source.pixels for source in sources.values()]))
            anonymized = self._model.anonymize_tensor(pixels)
            if not bool(torch.isfinite(anonymized).all()):
                raise BadInput("the anonymizer returns NaN or infinity; the checkpoint is broken")
            levels = quantize_pixels(anonymized)
            for index, image in zip(sources, levels.cpu().numpy(), strict=True):
                tasks[index] = replace(tasks[index], image=image)
        future = executor.submit(seal_batch, tasks)
        vectors = {}
        if sources and self._index is not None:  # of the rounded images, while workers seal them
            names = (items[index].task.name for index in sources)
            images_of_batch = dequantize_pixels(levels)
            vectors = dict(zip(names, embeddings(self._model, images_of_batch), strict=True))
        self._sealing.append((items, vectors, future))

    def _finish_oldest(self) -> None:
        """Wait for the oldest batch that is being sealed, and report its images."""
        items, vectors, future = self._sealing.popleft()
        for item, result in zip(items, future.result(), strict=True):
            if isinstance(result, IsedError):
                self._report(item.task.metadata.path, result)
                continue
            name = item.task.name
            if self._index is not None and name in vectors:
                try:
                    self._index.add(item.key_id, bytes.fromhex(result[name]), vectors[name])
                except IsedError as error:
                    error.of_one_file()  # the key was revoked or destroyed meanwhile
            self._report_done(item, result)

    def _report_done(self, item: _Item, sealed: Mapping[str, str]) -> None:
        """Count an image that is complete, with the SHA-256 by name of files just sealed."""
        name, summary = item.task.name, self._summary
        summary.sealed += name in sealed
        summary.present += name not in sealed
        summary.originals += original_name(name) in sealed
        summary.exif += item.source is not None and item.source.had_exif
        summary.digests |= {**item.present, **sealed}
        self._report(item.task.metadata.path, None)
