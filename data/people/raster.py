"""A small depth-buffered renderer of tapered elliptic tubes, in NumPy.

Bodies are tubes: limbs, trunk, head, shoes, bags. Along the picture plane a tube's axis is a line
and its cross-section an ellipse turned with the person, so each pixel's point of the surface has a
closed form: where along the axis, where around it, how near, and which way it faces. Patterns live
on those surface coordinates and therefore stay on the garment when the person turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.people.skeleton import Vector, View

Array = NDArray[np.float32]
Paint = Callable[[Array, Array, Array], Array]
Cut = Callable[[Array, Array], NDArray[np.bool_]]


@dataclass(frozen=True)
class Tube:
    """One part of a body.

    Attributes:
        start, end: Ends of the axis in body axes, metres.
        wide, deep: Half-axes of the cross-section sideways and forward, metres, at equal steps
            from start to end.
        paint: ``(along, around, metres) -> (N, 3)`` sRGB in [0, 255]; along in [0, 1], around in
            radians (0 the person's left, pi/2 the front), metres from the start.
        caps: Lengths of the rounded ends, metres; 0 is a flat end.
        cut: Optional ``(along, around) -> bool``: which part of the surface exists.
        gloss: Strength of the highlight.
        lift: Metres by which the part counts as nearer, to lie on top of another.
    """

    start: Vector
    end: Vector
    wide: tuple[float, ...]
    deep: tuple[float, ...]
    paint: Paint
    caps: tuple[float, float] = (0.0, 0.0)
    cut: Cut | None = None
    gloss: float = 0.0
    lift: float = 0.0


@dataclass(frozen=True)
class Light:
    """Light of a place: direction towards it (right, up, near), and strengths."""

    direction: tuple[float, float, float]
    ambient: float
    direct: float


@dataclass(frozen=True)
class Frame:
    """Where metres lie in the picture: pixels per metre, and the pixel of (0, 0)."""

    scale: float
    origin: tuple[float, float]
    size: tuple[int, int]  # width, height


class _Buffers:
    def __init__(self, size: tuple[int, int]) -> None:
        shape = size[::-1]
        self.near = np.full(shape, -np.inf, np.float32)
        self.part = np.full(shape, -1, np.int16)
        self.values = np.zeros((4, *shape), np.float32)  # along, around, metres, shade


def render(
    tubes: list[Tube], view: View, light: Light, frame: Frame
) -> tuple[Array, NDArray[np.bool_]]:
    """Draw tubes.

    Returns:
        Colours, float32 (H, W, 3) in [0, 255], and the mask (H, W) of what is covered.
    """
    buffers = _Buffers(frame.size)
    for index, tube in enumerate(tubes):
        _rasterize(buffers, index, tube, view, light, frame)
    colours = np.zeros((*buffers.part.shape, 3), np.float32)
    for index, tube in enumerate(tubes):
        rows, columns = np.nonzero(buffers.part == index)
        if len(rows):
            along, around, metres, shade = buffers.values[:, rows, columns]
            lit = tube.paint(along, around, metres) * shade[:, None]
            colours[rows, columns] = lit
    return colours, buffers.part >= 0


def _rasterize(
    buffers: _Buffers, index: int, tube: Tube, view: View, light: Light, frame: Frame
) -> None:
    start, end = view.project(tube.start), view.project(tube.end)
    axis = (end - start)[:2]
    length = max(float(np.hypot(*axis)), 1e-4)
    direction = axis / length if length > 1e-3 else np.array([0.0, 1.0])
    across = np.array([direction[1], -direction[0]]) * (1.0 if direction[1] >= 0 else -1.0)
    reach = max(*tube.wide, *tube.deep, *tube.caps) * frame.scale + 2
    ends = np.array([frame.origin + p[:2] * (frame.scale, -frame.scale) for p in (start, end)])
    low = np.maximum(np.floor(ends.min(0) - reach), 0).astype(int)
    high = np.minimum(np.ceil(ends.max(0) + reach), frame.size).astype(int)
    if (high <= low).any():
        return
    right = (np.arange(low[0], high[0], dtype=np.float32) + 0.5 - ends[0, 0]) / frame.scale
    up = -(np.arange(low[1], high[1], dtype=np.float32) + 0.5 - ends[0, 1]) / frame.scale
    metres = right * np.float32(direction[0]) + up[:, None] * np.float32(direction[1])
    offset = right * np.float32(across[0]) + up[:, None] * np.float32(across[1])
    beyond = np.where(metres < 0, metres, np.maximum(metres - length, 0))
    cap = np.where(metres < 0, max(tube.caps[0], 1e-6), max(tube.caps[1], 1e-6))
    round_end = 1 - (beyond / cap) ** 2
    along = np.clip(metres / length, 0, 1).astype(np.float32)
    steps = np.linspace(0, 1, len(tube.wide))
    shrink = np.sqrt(np.maximum(round_end, 1e-6))
    wide = np.interp(along, steps, tube.wide) * shrink
    deep = np.interp(along, steps, tube.deep) * shrink
    sine, cosine = math.sin(view.yaw), math.cos(view.yaw)
    extent = np.hypot(wide * cosine, deep * sine)
    rows, columns = np.nonzero((np.abs(offset) < extent) & (round_end > 0))
    if not len(rows):
        return
    pick = (rows, columns)
    wide, deep, extent, along = wide[pick], deep[pick], extent[pick], along[pick]
    # The near one of the two points of the ellipse above this offset.
    turn = np.arctan2(deep * sine, wide * cosine)
    around = turn + np.arccos(offset[pick] / extent)
    near = -wide * np.cos(around) * sine + deep * np.sin(around) * cosine
    mirrored = 2 * turn - around
    other = -wide * np.cos(mirrored) * sine + deep * np.sin(mirrored) * cosine
    around, near = np.where(near >= other, around, mirrored), np.maximum(near, other)
    depth = start[2] + (end[2] - start[2]) * along + near + tube.lift
    target = (rows + low[1], columns + low[0])
    visible = depth > buffers.near[target]
    if tube.cut is not None:
        visible &= tube.cut(along, around)
    normal = _normal(around, wide, deep, (beyond / cap)[pick], (sine, cosine))
    shade = _shade(normal, across, direction, light, tube.gloss)
    spot = (target[0][visible], target[1][visible])
    buffers.near[spot] = depth[visible]
    buffers.part[spot] = index
    true_length = np.float32(np.linalg.norm(tube.end - tube.start))
    values = np.stack([along, around, along * true_length, shade])
    buffers.values[:, spot[0], spot[1]] = values[:, visible]


def _normal(
    around: Array, wide: Array, deep: Array, cap: Array, turn: tuple[float, float]
) -> tuple[Array, Array, Array]:
    """Outward normal as (across the axis, along the axis, towards the camera)."""
    sine, cosine = turn
    x, z = np.cos(around) * deep, np.sin(around) * wide
    norm = np.sqrt(x * x + z * z) + 1e-9
    flat = np.sqrt(np.maximum(1 - cap * cap, 0))
    x, z = x / norm * flat, z / norm * flat
    return x * cosine + z * sine, cap, -x * sine + z * cosine


def _shade(
    normal: tuple[Array, Array, Array], across: Vector, direction: Vector, light: Light, gloss: float
) -> Array:
    sideways, lengthwise, near = normal
    right = sideways * across[0] + lengthwise * direction[0]
    up = sideways * across[1] + lengthwise * direction[1]
    facing = right * light.direction[0] + up * light.direction[1] + near * light.direction[2]
    diffuse = np.maximum(facing, 0)
    rim = 0.72 + 0.28 * np.maximum(near, 0)  # edges turn away from the open sky as well
    shade = light.ambient * rim + light.direct * diffuse
    return (shade + gloss * diffuse**12).astype(np.float32)
