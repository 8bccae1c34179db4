"""Draw images of people in front of cameras, cropped as by a detector, and write them to files."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data.people.appearance import LEAST_HEIGHT, MOST_HEIGHT, Person
from data.people.cameras import Camera, build_camera, defocus, expose
from data.people.figure import build_figure
from data.people.raster import Array, Frame, render
from data.people.scenery import BOUNDARY, STRIP
from data.people.skeleton import View

SIZE = (64, 128)  # width and height of an image, as in Market-1501
_OVER = 2  # images are drawn at this multiple of SIZE and reduced
_WIDTH, _HEIGHT = SIZE[0] * _OVER, SIZE[1] * _OVER
_STATURE = 1.77  # metres from the floor to the top of a drawn head with hair


@dataclass(frozen=True)
class Track:
    """What the images of one walk past one camera have in common."""

    yaw: float
    phase: float
    place: float  # horizontal position in the scene, [0, 1]
    gain: float
    distance: float  # factor on the size in the image


def draw_track(camera: Camera, rng: np.random.Generator) -> Track:
    """Draw a walk: usually in the camera's main direction, sometimes in the opposite one."""
    turned = math.pi if rng.random() < 0.25 else 0.0
    return Track(
        yaw=camera.yaw + turned + float(rng.normal(0, 0.28)),
        phase=float(rng.uniform(0, 2 * math.pi)),
        place=float(rng.uniform(0.05, 0.9)),
        gain=float(np.exp(rng.normal(0, 0.1))),
        distance=float(rng.uniform(0.94, 1.06)),
    )


def photograph(
    person: Person,
    seed: int,
    camera_index: int,
    track: Track,
    rng: np.random.Generator,
    *,
    careless: bool = False,
) -> Image.Image:
    """Draw one image.

    Args:
        person: The person.
        seed: Seed of the set, which determines its cameras.
        camera_index: Camera, from 0.
        track: The walk.
        rng: Random numbers for this image.
        careless: Whether the box is badly placed, as for distractors.

    Returns:
        RGB image of ``SIZE``.
    """
    camera, scene = build_camera(seed, camera_index)
    view = View(track.yaw + float(rng.normal(0, 0.1)), camera.pitch)
    slack = 2.5 if careless else 1.0
    size = (0.86 + 0.05 * slack * float(rng.normal())) * track.distance
    centre = _WIDTH * (0.5 + 0.035 * slack * float(rng.normal()))
    feet = _HEIGHT * (0.945 + 0.018 * slack * float(rng.normal()))
    size = size * (0.93 + 0.07 * (person.height - LEAST_HEIGHT) / (MOST_HEIGHT - LEAST_HEIGHT))
    frame = Frame(_HEIGHT * size / _STATURE, (centre, feet), (_WIDTH, _HEIGHT))
    tubes = build_figure(person, track.phase + float(rng.uniform(0, 2 * math.pi)))
    colours, mask = render(tubes, view, camera.light, frame)
    ground = _background(scene, track, rng, feet)
    ground = ground * _shadow(mask, camera, frame)[..., None]
    large = np.clip(np.where(mask[..., None], colours, ground), 0, 255).astype(np.uint8)
    small = Image.fromarray(large).resize(SIZE, Image.Resampling.LANCZOS)
    small = defocus(camera, small, float(rng.uniform(0.5, 1.5)))
    gain = track.gain * float(np.exp(rng.normal(0, 0.04)))
    grain = rng.normal(0, camera.noise, (SIZE[1], SIZE[0], 1))
    speckle = rng.normal(0, 0.4 * camera.noise, (SIZE[1], SIZE[0], 3))
    noisy = expose(camera, np.asarray(small, np.float32), gain) + grain + speckle
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _background(scene: Image.Image, track: Track, rng: np.random.Generator, feet: float) -> Array:
    """Return the part of the scene behind the person; the feet are on the ground for any box."""
    left = (STRIP[0] - _WIDTH) * np.clip(track.place + rng.normal(0, 0.04), 0, 1)
    top = np.clip(BOUNDARY + 76 - feet, 0, STRIP[1] - _HEIGHT)
    box = (float(left), float(top), float(left) + _WIDTH, float(top) + _HEIGHT)
    cut = scene.resize((_WIDTH, _HEIGHT), Image.Resampling.BILINEAR, box=box)
    return np.asarray(cut, np.float32)


def _shadow(mask: NDArray[np.bool_], camera: Camera, frame: Frame) -> Array:
    """Return the factor on the ground: the projected silhouette and a contact shadow."""
    right, down, darkness = camera.shadow
    centre, feet = frame.origin
    rows, columns = np.mgrid[0:_HEIGHT, 0:_WIDTH].astype(np.float32)
    contact = np.exp(
        -(((columns - centre) / (0.2 * frame.scale)) ** 2)
        - ((rows - feet + 3) / (0.045 * frame.scale)) ** 2
    )
    factor = 1 - 0.42 * contact
    if darkness > 0 and abs(down) > 0.01:
        # The shadow of a point at height h is (right, down) * h away from the feet.
        silhouette = Image.fromarray(mask.astype(np.uint8) * 255)
        slope = right / down
        transform = (1, slope, -slope * feet, 0, -1 / down, feet + feet / down)
        laid = silhouette.transform(
            (_WIDTH, _HEIGHT), Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR
        ).filter(ImageFilter.GaussianBlur(2.5))
        factor = factor * (1 - darkness * np.asarray(laid, np.float32) / 255)
    return factor.astype(np.float32)


_QUALITY = 92
_MIN_PARALLEL = 400  # with fewer images, starting processes takes longer than it saves


@dataclass(frozen=True)
class Walk:
    """One walk of one person past one camera."""

    person: Person
    pid: int
    number: int  # of the person in the whole set; part of the seed
    camera: int
    first: str  # folder of the first image
    rest: str  # folder of the other images
    images: int


def draw_walks(folder: Path, walks: list[Walk], seed: int) -> Iterator[int]:
    """Draw walks, in several processes if there are many; yield the number of new images."""
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
        # spawn, because a fork of a process with torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context)
        try:
            futures = {pool.submit(_draw, chunks[i], folder, seed): i for i in waiting}
            for future in as_completed(futures):
                done = future.result()
                waiting.discard(futures[future])
                yield done
        finally:
            pool.shutdown(cancel_futures=True)  # so that an interrupt ends at once
    except BrokenProcessPool:  # for example because memory ran out: draw the rest here
        for index in sorted(waiting):
            yield _draw(chunks[index], folder, seed)


def _can_start_processes() -> bool:
    """Return whether new processes can import the running program; not one from standard input."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    importable = program is None or Path(program).is_file()
    return importable and not multiprocessing.current_process().daemon


def _draw(walks: list[Walk], folder: Path, seed: int) -> int:
    """Draw walks into their folders; return the number of images."""
    drawn = 0
    for walk in walks:
        rng = np.random.default_rng([seed, 37, walk.number, walk.camera])
        track = draw_track(build_camera(seed, walk.camera)[0], rng)
        frame = int(rng.integers(1, 90000))
        for index in range(walk.images):
            image = photograph(walk.person, seed, walk.camera, track, rng, careless=walk.pid == 0)
            # The frame of a distractor is its number, so that all names differ.
            shown = 100_000 + walk.number if walk.pid == 0 else frame
            name = f"{walk.pid:04d}_c{walk.camera + 1}s1_{shown:06d}_{index:02d}.jpg"
            target = folder / (walk.first if index == 0 else walk.rest) / name
            image.save(target, quality=_QUALITY, subsampling=0)
            frame += int(rng.integers(8, 30))
            drawn += 1
    return drawn
