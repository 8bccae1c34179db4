"""Batches on their way through a protect run: some being read, one in the networks, some sealed.

Protect a folder: read, anonymize and seal every picture below it, overlapped and resumable.
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
    Setting,
    kill_workers,
    make_executor,
    read_chunk,
    seal_chunk,
)
from engine.vault.sources import SourceImage, list_sources
from engine.vault.subjects import SubjectOf
from modeling.encryption.cipher import quantize_pixels
from modeling.encryption.ised_errors import BadInput, IsedError, StorageError, UsageError
from modeling.encryption.sealed_image import Metadata, check_relative_path
from utils.errors import UserError
from utils.files import ensure_folder, remove_leftovers

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
    return quantize_pixels(anonymized).cpu().numpy()


MAX_BATCH = 64  # the folder is synced once a batch


@dataclass(frozen=True)
class ProtectOptions:
    """What to call things, and how to run.

    Attributes:
        dataset: Part of the output names.
        subject_of: Subject label of a relative path.
        batch: Pictures per batch, 1 to MAX_BATCH.
        workers: Processes that read and seal; 0 does everything in this one.
        overwrite: Replace outputs that are there.
    """

    dataset: str
    subject_of: SubjectOf
    batch: int = 32
    workers: int = 2
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            UsageError: A number is out of range.
        """
        if not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"batch is {self.batch}; expected 1 to {MAX_BATCH} pictures")
        if self.workers < 0:
            raise UsageError(f"workers is {self.workers}; expected 0 or more processes")


@dataclass
class Summary:
    """What became of a folder.

    Attributes:
        sealed, kept, failed: Numbers of pictures.
        exif: How many sealed pictures had EXIF data, which was not kept.
        exit_code: 0, 1 or 5 as the failures say.
        interrupted: Whether it ended on request.
    """

    sealed: int = 0
    kept: int = 0
    failed: int = 0
    exif: int = 0
    exit_code: int = 0
    interrupted: bool = False
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one picture."""
        if outcome.error is not None:
            self.failed += 1
            self.exit_code = max(self.exit_code, outcome.error.exit_code)
            return
        self.sealed += outcome.state == "sealed"
        self.kept += outcome.state == "kept"
        self.exif += outcome.had_exif
        self.digests[outcome.name] = outcome.digest


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
    """Anonymize and seal every picture below a folder.

    Of several processes started by torchrun each takes every N-th picture; the keyring's own
    transactions and the outputs' names, which are taken once and for all, keep them apart. All get
    the summary of all, and the first writes the one manifest. If any fails, files that are finished
    are whole and the same call puts them into it.

    The same call goes on after any interruption: the output name is a function of the input, and an
    output that is there is opened, and its source, its subject and its place in the manifest
    compared.

    Args:
        source: Folder of pictures; sub-folders are walked, links to files followed.
        target: Folder for the sealed files, made if need be.
        model: Anonymizes.
        keyring: Seals; every key is on disk before the first file under it.
        options: Names, subjects and how to run.
        report: Called for every picture.
        stop: When set, what is under way is finished and nothing new begun.

    Raises:
        UsageError: The folders overlap.
        StorageError, KeyringError: Nothing can go on; finished files are whole.
    """
    check_apart(source, target, keyring.store.path)
    paths, listed = from_main(lambda: _prepare(source, target, keyring))
    summary = Summary()

    def note(outcome: Outcome) -> None:
        summary.add(outcome)
        if report is not None:
            report(outcome)

    jobs, snapshot = _jobs(share(paths), keyring, options, listed, note)
    setting = Setting(source, target, model.size, snapshot, options.overwrite)
    size, stop = options.batch, stop or threading.Event()
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    key = keyring.manifest_key()
    names = [job.name for job in jobs]
    every = [name for one in all_gather(names) for name in one]
    from_main(lambda: _forget(target, key, every, overwrite=options.overwrite))
    try:
        protect_batches(batches, setting, model, options.workers, report=note, stop=stop)
        summary.interrupted = stop.is_set()
        summary = _together(all_gather(summary))
    except BaseException:
        if is_main():
            with suppress(UserError, OSError):  # the error under way says more than this one
                _add_to_manifest(target, key, options.dataset, summary.digests)
        raise
    if is_main():
        _add_to_manifest(target, key, options.dataset, summary.digests)
    return summary


def _prepare(source: Path, target: Path, keyring: Keyring) -> tuple[list[str], Mapping[str, str]]:
    """Make the output folder; return the sources, and the files that its manifest lists.

    Before any process works in it: it may be another keyring's.
    """
    paths = list_sources(source)
    try:
        ensure_folder(target)
    except UserError as error:
        raise StorageError(str(error)) from None
    remove_leftovers(target)
    return paths, _listed(target, keyring.manifest_key())


def _together(summaries: list[Summary]) -> Summary:
    """Return the summary of what several processes have done."""
    first, *others = summaries
    for one in others:
        first.sealed += one.sealed
        first.kept += one.kept
        first.failed += one.failed
        first.exif += one.exif
        first.exit_code = max(first.exit_code, one.exit_code)
        first.interrupted |= one.interrupted
        first.digests |= one.digests
    return first


def _add_to_manifest(target: Path, key: bytes, dataset: str, digests: dict[str, str]) -> None:
    """Add files to the manifest of a folder, whatever data set the others are of.

    It is read again, as another run may have ended meanwhile.
    """
    Manifest(dataset, {**_listed(target, key), **digests}).save(target, key)


def _forget(target: Path, key: bytes, names: Sequence[str], *, overwrite: bool) -> None:
    """Take files that are to be made anew off the manifest: a run may be killed before it ends.

    What it has made by then would be taken for somebody else's by the next one.
    """
    manifest = Manifest.load(target, key)
    if manifest is None:
        return
    anew = {name for name in names if overwrite or not (target / name).exists()}
    kept = {name: digest for name, digest in manifest.files.items() if name not in anew}
    if len(kept) < len(manifest.files):
        Manifest(manifest.dataset, kept).save(target, key)


def _listed(target: Path, key: bytes) -> Mapping[str, str]:
    """Return the SHA-256 in hexadecimal of each file by name that a folder's manifest lists."""
    manifest = Manifest.load(target, key)
    return {} if manifest is None else manifest.files


def _jobs(
    paths: Sequence[str],
    keyring: Keyring,
    options: ProtectOptions,
    listed: Mapping[str, str],
    note: Report,
) -> tuple[list[Job], KeySnapshot]:
    """Return a job for every path whose subject can be sealed for, and the keys."""
    subjects: dict[str, str] = {}
    for path in paths:
        try:
            check_relative_path(path)
            subjects[path] = options.subject_of(path)
            keyring.check_subject(subjects[path])
        except IsedError as error:
            subjects.pop(path, None)
            note(Outcome(path, "", "failed", error=error))
    snapshot = keyring.snapshot(subjects.values())
    own = {
        subject: frozenset(row.key_id for row in keyring.rows_of(subject))
        for subject in set(subjects.values())
    }
    jobs = []
    for path, subject in subjects.items():
        name = keyring.file_name(options.dataset, path)
        try:
            key = snapshot.sealing_key(subject)
            jobs.append(Job(path, name, key, own[subject], listed.get(name)))
        except IsedError as error:
            note(Outcome(path, name, "failed", error=error))
    return jobs, snapshot
