"""One picture: a person in front of a camera, cut out as a detector would."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data.people.appearance import LEAST_HEIGHT, MOST_HEIGHT, Person
from data.people.cameras import Camera, build_camera, defocus, expose
from data.people.figure import build_figure
from data.people.raster import Array, Frame, render
from data.people.scenery import BOUNDARY, STRIP
from data.people.skeleton import View

SIZE = (64, 128)  # width, height of a picture, as in Market-1501
_OVER = 2  # drawn at this multiple, then reduced
_WIDTH, _HEIGHT = SIZE[0] * _OVER, SIZE[1] * _OVER
_STATURE = 1.77  # metres from the floor to the top of a drawn head with hair


@dataclass(frozen=True)
class Track:
    """One walk past one camera: what its pictures share."""

    yaw: float
    phase: float
    place: float  # in the scene, [0, 1]
    gain: float
    distance: float  # factor on the size in the picture


def draw_track(camera: Camera, rng: np.random.Generator) -> Track:
    """Draw a walk: mostly the camera's usual way, sometimes the other way."""
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
    """Take one picture.

    Args:
        person: Whom.
        seed: Seed of the set, which fixes its cameras.
        camera_index: Which camera, from 0.
        track: The walk the picture belongs to.
        rng: Source of what differs from picture to picture.
        careless: A detector's badly placed box, as distractors have.

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
    """Cut the place behind the person; feet stay on the ground however the box lies."""
    left = (STRIP[0] - _WIDTH) * np.clip(track.place + rng.normal(0, 0.04), 0, 1)
    top = np.clip(BOUNDARY + 76 - feet, 0, STRIP[1] - _HEIGHT)
    box = (float(left), float(top), float(left) + _WIDTH, float(top) + _HEIGHT)
    cut = scene.resize((_WIDTH, _HEIGHT), Image.Resampling.BILINEAR, box=box)
    return np.asarray(cut, np.float32)


def _shadow(mask: NDArray[np.bool_], camera: Camera, frame: Frame) -> Array:
    """Factor on the ground: the silhouette laid down along the light, and a contact shadow."""
    right, down, darkness = camera.shadow
    centre, feet = frame.origin
    rows, columns = np.mgrid[0:_HEIGHT, 0:_WIDTH].astype(np.float32)
    contact = np.exp(
        -(((columns - centre) / (0.2 * frame.scale)) ** 2)
        - ((rows - feet + 3) / (0.045 * frame.scale)) ** 2
    )
    factor = 1 - 0.42 * contact
    if darkness > 0 and abs(down) > 0.01:
        # A point at height h throws its shadow (right, down) * h from the feet.
        silhouette = Image.fromarray(mask.astype(np.uint8) * 255)
        slope = right / down
        transform = (1, slope, -slope * feet, 0, -1 / down, feet + feet / down)
        laid = silhouette.transform(
            (_WIDTH, _HEIGHT), Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR
        ).filter(ImageFilter.GaussianBlur(2.5))
        factor = factor * (1 - darkness * np.asarray(laid, np.float32) / 255)
    return factor.astype(np.float32)
