"""The cameras of a set, and images of people in front of them, cropped as by a detector."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data.people.appearance import LEAST_HEIGHT, MOST_HEIGHT, Person
from data.people.figure import build_figure
from data.people.raster import Array, Frame, Light, View, render
from data.people.scenery import BOUNDARY, SCENES, STRIP, draw_scene

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
    """Return an RGB image of ``SIZE``, drawn with the next numbers of ``rng``.

    The seed of the set and the camera, from 0, determine light and background. A careless box is
    badly placed, as for distractors.
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
    small = small.filter(ImageFilter.GaussianBlur(camera.blur * float(rng.uniform(0.5, 1.5))))
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


MAX_CAMERAS = 9  # one digit in a Market-1501 name


@dataclass(frozen=True)
class Camera:
    """One camera of a set."""

    scene: str  # key of ``SCENES``
    yaw: float  # its view of people who walk in the usual direction, radians
    pitch: float  # downward angle, radians
    light: Light  # light on people
    # offset of cast shadows (sideways and downwards, per metre of height), and their darkness; with
    # 0 only the contact shadow is drawn
    shadow: tuple[float, float, float]
    gains: tuple[float, float, float]  # colour cast, a factor for red, green and blue
    gamma: float
    saturation: float
    contrast: float
    veil: float  # stray light in [0, 1]
    blur: float  # radius of the optical blur, pixels of the final image
    noise: float  # standard deviation of the sensor noise, of 255


def _light(right: float, up: float, near: float, ambient: float, direct: float) -> Light:
    norm = math.sqrt(right * right + up * up + near * near)
    return Light((right / norm, up / norm, near / norm), ambient, direct)


# Daylight from the left; evening sun; overcast; fluorescent tubes; haze; the shade of dark walls.
_DESIGNS = (
    Camera("plaza", 0.35, 0.10, _light(-0.6, 0.6, 0.5, 0.64, 0.50), (0.42, 0.10, 0.36),
           (1.02, 1.0, 0.98), 1.0, 1.0, 1.05, 0.0, 0.35, 2.0),
    Camera("park", 1.25, 0.07, _light(0.9, 0.35, 0.3, 0.60, 0.58), (-0.75, 0.07, 0.4),
           (1.12, 1.0, 0.82), 0.95, 1.05, 1.05, 0.02, 0.4, 2.5),
    Camera("shop", 2.75, 0.20, _light(0.1, 0.9, 0.3, 0.80, 0.26), (0.0, 0.0, 0.0),
           (0.89, 0.98, 1.12), 1.08, 0.88, 0.95, 0.04, 0.45, 2.5),
    Camera("corridor", -0.30, 0.24, _light(0.0, 0.8, 0.6, 0.76, 0.34), (0.0, 0.06, 0.16),
           (0.97, 1.05, 0.88), 0.90, 0.9, 0.93, 0.06, 0.45, 3.0),
    Camera("crossing", -1.40, 0.13, _light(-0.4, 0.8, -0.2, 0.68, 0.38), (0.3, -0.12, 0.3),
           (1.03, 0.96, 1.02), 0.94, 0.82, 0.9, 0.11, 0.5, 2.0),
    Camera("station", 0.95, 0.16, _light(-0.2, 0.9, 0.4, 0.66, 0.34), (0.1, 0.05, 0.2),
           (1.08, 0.98, 0.88), 1.18, 0.95, 1.0, 0.01, 0.5, 4.0),
)  # fmt: skip


@lru_cache(maxsize=MAX_CAMERAS)
def build_camera(seed: int, index: int) -> tuple[Camera, Image.Image]:
    """Return camera ``index`` (from 0) of the set of a seed, and its scene.

    After six cameras the designs repeat with another scene, direction and colour cast. The seed
    varies all of them.
    """
    rng = np.random.default_rng([seed, 23, index])
    design = _DESIGNS[index % len(_DESIGNS)]
    repetition = index // len(_DESIGNS)
    names = tuple(SCENES)
    scene = names[(names.index(design.scene) + 2 * repetition) % len(names)]
    gains = np.asarray(design.gains) * np.exp(rng.normal(0, 0.02 + 0.05 * repetition, 3))
    camera = replace(
        design,
        scene=scene,
        yaw=design.yaw + rng.normal(0, 0.1) + 1.1 * repetition,
        pitch=design.pitch * float(rng.uniform(0.85, 1.15)),
        gains=(float(gains[0]), float(gains[1]), float(gains[2])),
        gamma=design.gamma * float(np.exp(rng.normal(0, 0.03))),
    )
    return camera, draw_scene(scene, rng)


def expose(camera: Camera, pixels: Array, gain: float) -> Array:
    """Return what a camera records of sRGB pixels, both float32 (H, W, 3) in [0, 255].

    ``gain`` is the exposure of this image, about 1.
    """
    values = np.clip(pixels / 255.0 * np.asarray(camera.gains, np.float32) * gain, 0, 1.2)
    values = values**camera.gamma
    grey = values @ np.asarray((0.299, 0.587, 0.114), np.float32)
    values = grey[..., None] + camera.saturation * (values - grey[..., None])
    values = 0.5 + camera.contrast * (values - 0.5)
    values = values * (1 - camera.veil) + camera.veil
    # Compressed instead of clipped, so that bright shirts keep their pattern.
    values = np.where(values > 0.85, 0.85 + 0.15 * np.tanh((values - 0.85) / 0.15), values)
    return (255 * np.clip(values, 0, 1)).astype(np.float32)
