"""A renderer of tapered elliptic tubes with a depth buffer, in NumPy.

All parts of a person are tubes: limbs, trunk, head, shoes, bags. In the image a tube's axis is a
line, and its cross-section is an ellipse that turns with the person. So the surface point of each
pixel has a closed form: position along the axis, angle around it, depth and normal. Patterns are
functions of these coordinates and therefore turn with the person.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Array = NDArray[np.float32]
Paint = Callable[[Array, Array, Array], Array]
Cut = Callable[[Array, Array], NDArray[np.bool_]]


@dataclass(frozen=True)
class View:
    """Direction from which the camera sees a person."""

    yaw: float  # radians; 0: the person faces the camera, pi/2: walks to the right of the image
    pitch: float  # downward angle of the camera, radians

    def project(self, point: Vector) -> Vector:
        """Return (right, up, towards the camera) of a point in body axes, metres."""
        x, y, z = point
        right = x * math.cos(self.yaw) + z * math.sin(self.yaw)
        near = -x * math.sin(self.yaw) + z * math.cos(self.yaw)
        up = y * math.cos(self.pitch) - near * math.sin(self.pitch)
        return np.array([right, up, near * math.cos(self.pitch) + y * math.sin(self.pitch)])


@dataclass(frozen=True)
class Tube:
    """One part of a body."""

    start: Vector  # ends of the axis in body axes, metres
    end: Vector
    # half-axes of the cross-section sideways and forward, metres, at equal steps from start to end
    wide: tuple[float, ...]
    deep: tuple[float, ...]
    # ``(along, around, metres) -> (N, 3)`` sRGB in [0, 255]; along in [0, 1], around in radians (0
    # is the person's left, pi/2 the front), metres from the start
    paint: Paint
    caps: tuple[float, float] = (0.0, 0.0)  # lengths of the rounded ends, metres; 0 is a flat end
    # optional ``(along, around) -> bool``: the part of the surface that exists
    cut: Cut | None = None
    gloss: float = 0.0  # strength of the highlight
    lift: float = 0.0  # offset towards the camera in the depth test, metres, to cover another part


def offset(y: float, z: float = 0.0, x: float = 0.0) -> Vector:
    """Return a vector in body axes; its upward component comes first."""
    return np.array([x, y, z])


def limb(
    start: Vector,
    end: Vector,
    radii: tuple[float, ...],
    paint: Paint,
    *,
    flat_end: bool = False,
    lift: float = 0.0,
) -> Tube:
    """Return a round tube with a round start, and an end that is round or flat like a cuff."""
    last = 0.012 if flat_end else radii[-1]
    return Tube(start, end, radii, radii, paint, caps=(radii[0], last), lift=lift)


@dataclass(frozen=True)
class Light:
    """Light of a scene: direction towards it (right, up, near), and strengths."""

    direction: tuple[float, float, float]
    ambient: float
    direct: float


@dataclass(frozen=True)
class Frame:
    """Mapping of metres to the image: pixels per metre, and the pixel of (0, 0)."""

    scale: float
    origin: tuple[float, float]
    size: tuple[int, int]  # width, height


class _Buffers:
    """Depth, part, and (along, around, metres, shade) of the nearest surface of each pixel."""

    def __init__(self, size: tuple[int, int]) -> None:
        pixels = size[0] * size[1]
        self.near = np.full(pixels, -np.inf, np.float32)
        self.part = np.full(pixels, -1, np.int16)
        self.values = np.zeros((4, pixels), np.float32)


def render(
    tubes: list[Tube], view: View, light: Light, frame: Frame
) -> tuple[Array, NDArray[np.bool_]]:
    """Draw tubes.

    Returns:
        Colours, float32 (H, W, 3) in [0, 255], and the mask (H, W) of covered pixels.
    """
    buffers = _Buffers(frame.size)
    for index, tube in enumerate(tubes):
        _rasterize(buffers, index, tube, view, light, frame)
    width, height = frame.size
    colours = np.zeros((height * width, 3), np.float32)
    covered = np.flatnonzero(buffers.part >= 0)
    covered = covered[np.argsort(buffers.part[covered], kind="stable")]
    parts, starts = np.unique(buffers.part[covered], return_index=True)
    for part, pixels in zip(parts, np.split(covered, starts[1:]), strict=True):
        along, around, metres, shade = buffers.values[:, pixels]
        colours[pixels] = tubes[part].paint(along, around, metres) * shade[:, None]
    mask = (buffers.part >= 0).reshape(height, width)
    return colours.reshape(height, width, 3), mask


def _rasterize(
    buffers: _Buffers, index: int, tube: Tube, view: View, light: Light, frame: Frame
) -> None:
    start, end = view.project(tube.start), view.project(tube.end)
    axis = (end - start)[:2]
    length = max(math.hypot(*axis), 1e-4)
    direction = axis / length if length > 1e-3 else np.array([0.0, 1.0])
    across = np.array([direction[1], -direction[0]]) * (1.0 if direction[1] >= 0 else -1.0)
    pixels, metres, aside = _candidates(tube, (start, end), direction, across, frame)
    if not len(pixels):
        return
    beyond = np.where(metres < 0, metres, np.maximum(metres - length, 0))
    start_cap, end_cap = (np.float32(max(cap, 1e-6)) for cap in tube.caps)
    cap: Array = beyond / np.where(metres < 0, start_cap, end_cap)
    along = np.clip(metres / length, 0, 1)
    shrink = np.sqrt(np.maximum(1 - cap * cap, 1e-6))
    steps = np.arange(len(tube.wide)) / (len(tube.wide) - 1)
    wide = np.interp(along, steps, tube.wide).astype(np.float32) * shrink
    deep = np.interp(along, steps, tube.deep).astype(np.float32) * shrink
    sine, cosine = math.sin(view.yaw), math.cos(view.yaw)
    extent = np.sqrt((wide * cosine) ** 2 + (deep * sine) ** 2)
    # aside = extent cos(around - turn) has two solutions. The larger angle is the near one, because
    # the view rotates the cross-section without mirroring it.
    turn = np.arctan2(deep * sine, wide * cosine)
    around = turn + np.arccos(np.clip(aside / extent, -1, 1))
    near = deep * np.sin(around) * cosine - wide * np.cos(around) * sine
    depth = (start[2] + (end[2] - start[2]) * along + near + tube.lift).astype(np.float32)
    visible = (np.abs(aside) < extent) & (np.abs(cap) < 1) & (depth > buffers.near[pixels])
    if tube.cut is not None:
        visible &= tube.cut(along, around)
    keep = np.flatnonzero(visible)
    wide, deep, around, along = wide[keep], deep[keep], around[keep], along[keep]
    normal = _normal(around, wide, deep, cap[keep], (sine, cosine))
    pixels = pixels[keep]
    buffers.near[pixels] = depth[keep]
    buffers.part[pixels] = index
    buffers.values[0, pixels] = along
    buffers.values[1, pixels] = around
    buffers.values[2, pixels] = along * np.float32(np.linalg.norm(tube.end - tube.start))
    buffers.values[3, pixels] = _shade(normal, across, direction, light, tube.gloss)


def _candidates(
    tube: Tube, ends: tuple[Vector, Vector], direction: Vector, across: Vector, frame: Frame
) -> tuple[NDArray[np.intp], Array, Array]:
    """Return the pixels that a tube may cover: flat index, metres along its axis and across it."""
    width, height = frame.size
    radius = max(*tube.wide, *tube.deep)
    reach = max(radius, *tube.caps) * frame.scale + 2
    spots = np.array([frame.origin + p[:2] * (frame.scale, -frame.scale) for p in ends])
    low = np.maximum(np.floor(spots.min(0) - reach), 0).astype(int)
    high = np.minimum(np.ceil(spots.max(0) + reach), frame.size).astype(int)
    right = (np.arange(low[0], max(high[0], low[0])) + (0.5 - spots[0, 0])) / frame.scale
    up = (spots[0, 1] - 0.5 - np.arange(low[1], max(high[1], low[1]))) / frame.scale
    right, up = right.astype(np.float32), up.astype(np.float32)[:, None]
    metres = right * np.float32(direction[0]) + up * np.float32(direction[1])
    aside = right * np.float32(across[0]) + up * np.float32(across[1])
    length = math.hypot(*(ends[1] - ends[0])[:2])
    inside = (np.abs(aside) < radius) & (metres > -tube.caps[0]) & (metres < length + tube.caps[1])
    chosen = np.flatnonzero(inside)
    if not len(chosen):
        return chosen, metres[:0], aside[:0]
    rows, columns = np.divmod(chosen, len(right))
    pixels = (rows + low[1]) * width + columns + low[0]
    return pixels, metres.reshape(-1)[chosen], aside.reshape(-1)[chosen]


def _normal(
    around: Array, wide: Array, deep: Array, cap: Array, turn: tuple[float, float]
) -> tuple[Array, Array, Array]:
    """Return the outward normal as (across the axis, along the axis, towards the camera)."""
    sine, cosine = turn
    x, z = np.cos(around) * deep, np.sin(around) * wide
    norm = np.sqrt(x * x + z * z) + 1e-9
    flat = np.sqrt(np.maximum(1 - cap * cap, 0))
    x, z = x / norm * flat, z / norm * flat
    return x * cosine + z * sine, cap, -x * sine + z * cosine


def _shade(
    normal: tuple[Array, Array, Array],
    across: Vector,
    direction: Vector,
    light: Light,
    gloss: float,
) -> Array:
    sideways, lengthwise, near = normal
    right = sideways * across[0] + lengthwise * direction[0]
    up = sideways * across[1] + lengthwise * direction[1]
    facing = right * light.direction[0] + up * light.direction[1] + near * light.direction[2]
    diffuse = np.maximum(facing, 0)
    rim = 0.72 + 0.28 * np.maximum(near, 0)  # edges also get less ambient light
    shade = light.ambient * rim + light.direct * diffuse
    return (shade + gloss * diffuse**12).astype(np.float32)
