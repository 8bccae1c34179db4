"""Drawing people's walks past cameras into files, in several processes where that pays."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.people.appearance import Person
from data.people.cameras import build_camera
from data.people.photograph import draw_track, photograph

_QUALITY = 92
_MIN_PARALLEL = 400  # pictures below which starting processes costs more than it saves


@dataclass(frozen=True)
class Walk:
    """One walk of one person past one camera."""

    person: Person
    pid: int
    number: int  # of the person in the whole set, seeds the drawing
    camera: int
    first: str  # folder of the first picture
    rest: str
    images: int


def draw_walks(folder: Path, walks: list[Walk], seed: int) -> Iterator[int]:
    """Draw walks, in processes where that pays; yields the number of pictures just drawn."""
    size = 24
    chunks = [walks[i : i + size] for i in range(0, len(walks), size)]
    workers = min(os.cpu_count() or 1, 8, len(chunks))
    few = sum(walk.images for walk in walks) < _MIN_PARALLEL
    if workers < 2 or few or not _can_start_processes():
        for walk in walks:
            yield _draw([walk], folder, seed)
        return
    waiting = set(range(len(chunks)))
    try:
        # "spawn": a fork of a process that has started torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context)
        try:
            futures = {pool.submit(_draw, chunks[i], folder, seed): i for i in waiting}
            for future in as_completed(futures):
                done = future.result()
                waiting.discard(futures[future])
                yield done
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    except BrokenProcessPool:  # e.g. one was ended for want of memory
        for index in sorted(waiting):
            yield _draw(chunks[index], folder, seed)


def _can_start_processes() -> bool:
    """Whether new processes can import what runs here: a program on standard input they cannot."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    found = program is None or Path(program).is_file()
    return found and not multiprocessing.current_process().daemon


def _draw(walks: list[Walk], folder: Path, seed: int) -> int:
    """Draw walks into their folders; returns the number of pictures."""
    drawn = 0
    for walk in walks:
        rng = np.random.default_rng([seed, 37, walk.number, walk.camera])
        track = draw_track(build_camera(seed, walk.camera)[0], rng)
        frame = int(rng.integers(1, 90000))
        for index in range(walk.images):
            picture = photograph(walk.person, seed, walk.camera, track, rng, careless=walk.pid == 0)
            # A distractor's frame is its own number, so that no two pictures share a name.
            shown = 100_000 + walk.number if walk.pid == 0 else frame
            name = f"{walk.pid:04d}_c{walk.camera + 1}s1_{shown:06d}_{index:02d}.jpg"
            target = folder / (walk.first if index == 0 else walk.rest) / name
            picture.save(target, quality=_QUALITY, subsampling=0)
            frame += int(rng.integers(8, 30))
            drawn += 1
    return drawn
