"""The cameras: scene, viewpoint, light, colours and optics, fixed for each camera."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from data.people.raster import Array, Light
from data.people.scenery import SCENES, draw_scene

MAX_CAMERAS = 9  # one digit in a Market-1501 name


@dataclass(frozen=True)
class Camera:
    """One camera of a set.

    Attributes:
        scene: Key of ``SCENES``.
        yaw, pitch: Its view of people who walk in the usual direction, radians.
        light: Light on people.
        shadow: Offset of cast shadows (sideways and downwards, per metre of height), and their
            darkness; with 0 only the contact shadow is drawn.
        gains: Colour cast, a factor for red, green and blue.
        gamma, saturation, contrast, veil: Tone; ``veil`` is stray light in [0, 1].
        blur: Radius of the optical blur, pixels of the final image.
        noise: Standard deviation of the sensor noise, of 255.
    """

    scene: str
    yaw: float
    pitch: float
    light: Light
    shadow: tuple[float, float, float]
    gains: tuple[float, float, float]
    gamma: float
    saturation: float
    contrast: float
    veil: float
    blur: float
    noise: float


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
    camera = Camera(
        scene=scene,
        yaw=design.yaw + rng.normal(0, 0.1) + 1.1 * repetition,
        pitch=design.pitch * float(rng.uniform(0.85, 1.15)),
        light=design.light,
        shadow=design.shadow,
        gains=(float(gains[0]), float(gains[1]), float(gains[2])),
        gamma=design.gamma * float(np.exp(rng.normal(0, 0.03))),
        saturation=design.saturation,
        contrast=design.contrast,
        veil=design.veil,
        blur=design.blur,
        noise=design.noise,
    )
    return camera, draw_scene(scene, rng)


def expose(camera: Camera, pixels: Array, gain: float) -> Array:
    """Return the image that a camera records of a scene.

    Args:
        camera: The camera.
        pixels: sRGB, float32 (H, W, 3) in [0, 255].
        gain: Exposure of this image, about 1.

    Returns:
        float32 (H, W, 3), in [0, 255] up to rounding.
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


def defocus(camera: Camera, image: Image.Image, sharpness: float) -> Image.Image:
    """Blur with the camera's radius times ``sharpness``."""
    return image.filter(ImageFilter.GaussianBlur(camera.blur * sharpness))
