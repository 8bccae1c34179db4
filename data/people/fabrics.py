"""Colours of surfaces (cloth, skin, hair) as functions of surface coordinates.

A paint is a function of (along, around, metres), each (N,), that returns sRGB (N, 3) in [0, 255].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from data.people.appearance import GARMENT_COLOURS, RGB, Garment
from data.people.raster import Array, Paint

FRONT = math.pi / 2
_GIRTH = 0.17  # metres of cloth per radian around a trunk


def _mix(mask: Array | NDArray[np.bool_], yes: RGB, no: RGB) -> Array:
    weight = np.asarray(mask, np.float32)[:, None]
    return weight * np.asarray(yes, np.float32) + (1 - weight) * np.asarray(no, np.float32)


def darker(colour: RGB, factor: float) -> RGB:
    """Scale a colour."""
    red, green, blue = colour
    return (factor * red, factor * green, factor * blue)


def from_front(around: Array) -> Array:
    """Return the angle from the front, in [-pi, pi], positive towards the person's left."""
    return (FRONT - around + math.pi) % (2 * math.pi) - math.pi


def plain(colour: RGB) -> Paint:
    """Return the paint of one colour."""
    values = np.asarray(colour, np.float32)
    return lambda along, _around, _metres: np.broadcast_to(values, (len(along), 3))


def _pattern(garment: Garment, along: Array, around: Array, metres: Array, girth: float) -> Array:
    """Return the weight of the second colour, in [0, 1], for the patterns of all garments."""
    period = garment.period
    side = from_front(around) * girth
    if garment.pattern == "stripes":
        return (metres / period % 1 < 0.5).astype(np.float32)
    if garment.pattern == "columns":
        return (side / (period * 0.8) % 1 < 0.45).astype(np.float32)
    if garment.pattern == "checks":
        rows, columns = metres / period % 1 < 0.5, (side / period + 0.25) % 1 < 0.5
        return 0.5 * rows.astype(np.float32) + 0.5 * columns.astype(np.float32)
    if garment.pattern == "diagonal":
        return ((metres + side) / (period * 1.2) % 1 < 0.5).astype(np.float32)
    return np.zeros_like(along)


def trunk(garment: Garment, folds: float, *, open_over: str | None = None) -> Paint:
    """Return the paint of the trunk; ``along`` goes from the hem to the neck.

    Args:
        garment: The garment.
        folds: Phase of the folds, radians.
        open_over: Colour of the shirt under a garment that is open in front.
    """
    first, second = GARMENT_COLOURS[garment.colour], GARMENT_COLOURS[garment.second]

    def paint(along: Array, around: Array, metres: Array) -> Array:
        front = from_front(around)
        weight = _pattern(garment, along, around, metres, _GIRTH)
        if garment.pattern == "block":
            weight = (along > 0.56).astype(np.float32)
        elif garment.pattern == "band":
            weight = ((along > 0.42) & (along < 0.66)).astype(np.float32)
        elif garment.pattern == "print":  # on the chest and on the back
            face = np.minimum(np.abs(front), np.abs(np.abs(front) - math.pi))
            weight = ((face / 0.85) ** 2 + ((along - 0.6) / 0.2) ** 2 < 1).astype(np.float32)
        colours = _mix(weight, second, first)
        if open_over is not None:
            gap = np.abs(front) < 0.22 + 0.25 * along
            colours = np.where(gap[:, None], GARMENT_COLOURS[open_over], colours)
            edge = np.abs(np.abs(front) - (0.22 + 0.25 * along)) < 0.07
            colours = np.where(edge[:, None], colours * 0.72, colours)
        crease = 1 + 0.07 * np.sin(17 * along + 5 * around + folds) * (1 - along)
        hem = np.where(along < 0.035, 0.8, 1.0)
        return (colours * (crease * hem)[:, None]).astype(np.float32)

    return paint


def sleeve(garment: Garment, start: float, *, contrast: bool = False) -> Paint:
    """Return the paint of an arm; ``start`` is the length of sleeve above this part, metres."""
    first, second = GARMENT_COLOURS[garment.colour], GARMENT_COLOURS[garment.second]
    if contrast or garment.pattern == "sleeves":
        first = second
    if garment.pattern == "block" and start == 0:
        first = second

    def paint(along: Array, around: Array, metres: Array) -> Array:
        weight = _pattern(garment, along, around, metres + start, 0.06)
        crease = 1 + 0.06 * np.sin(40 * metres + 3 * around)
        return (_mix(weight, second, first) * crease[:, None]).astype(np.float32)

    return paint


def leg(garment: Garment, start: float, outside: int) -> Paint:
    """Return the paint of a leg; ``outside`` is +1 for the person's left leg."""
    first, second = GARMENT_COLOURS[garment.colour], GARMENT_COLOURS[garment.second]

    def paint(along: Array, around: Array, metres: Array) -> Array:
        weight = _pattern(garment, along, around, metres + start, 0.08)
        if garment.pattern == "side":
            weight = (np.cos(around) * outside > 0.72).astype(np.float32)
        colours = _mix(weight, second, first)
        if garment.pattern == "faded":
            worn = np.exp(-(((metres + start - 0.34) / 0.17) ** 2)) * 0.55
            colours = colours + (225 - colours) * worn[:, None]
        crease = 1 + 0.06 * np.sin(30 * (metres + start) + 2 * around)
        return (colours * crease[:, None]).astype(np.float32)

    return paint


def skirt(garment: Garment, folds: float) -> Paint:
    """Return the paint of a skirt, with deeper folds at the hem; ``along`` starts at the waist."""
    first, second = GARMENT_COLOURS[garment.colour], GARMENT_COLOURS[garment.second]

    def paint(along: Array, around: Array, metres: Array) -> Array:
        weight = _pattern(garment, along, around, metres, _GIRTH)
        if garment.pattern == "side":  # a hem in the second colour
            weight = (along > 0.78).astype(np.float32)
        pleats = 1 + 0.13 * along * np.sin(9 * around + folds)
        return (_mix(weight, second, first) * pleats[:, None]).astype(np.float32)

    return paint


def face(skin: RGB) -> Paint:
    """Return the paint of a head: eyes, brows, nose and mouth."""
    base = np.asarray(skin, np.float32)

    def paint(along: Array, around: Array, _metres: Array) -> Array:
        side = from_front(around)
        shade = np.ones_like(along)
        eyes = ((np.abs(np.abs(side) - 0.42) / 0.2) ** 2 + ((along - 0.55) / 0.055) ** 2) < 1
        brows = (np.abs(np.abs(side) - 0.42) < 0.28) & (np.abs(along - 0.68) < 0.035)
        nose = (np.abs(side) < 0.11) & (along > 0.32) & (along < 0.5)
        mouth = (np.abs(side) < 0.3) & (np.abs(along - 0.2) < 0.04)
        shade[nose] = 0.9
        shade[brows], shade[eyes] = 0.55, 0.34
        colours = base * shade[:, None]
        colours[mouth] = base * 0.6 + np.asarray((60, 16, 20), np.float32)
        return colours

    return paint


def strands(colour: RGB, *, curly: bool = False) -> Paint:
    """Return the paint of hair, straight or curly."""
    base = np.asarray(colour, np.float32)

    def paint(along: Array, around: Array, _metres: Array) -> Array:
        lines = (
            0.14 * np.sin(13 * around) * np.sin(27 * along) if curly else 0.07 * np.sin(23 * around)
        )
        shine = 1 + lines + 0.22 * np.exp(-(((along - 0.72) / 0.14) ** 2))
        return base * shine[:, None]

    return paint


def shoe(colour: RGB, *, sole: RGB) -> Paint:
    """Return the paint of a shoe with a sole at its lower edge."""

    def paint(along: Array, around: Array, _metres: Array) -> Array:
        return _mix((np.cos(around) < -0.55) | (along > 0.93), sole, colour)

    return paint


def knapsack(colour: RGB) -> Paint:
    """Return the paint of a backpack with a pocket, a zip and a lid."""
    base = np.asarray(colour, np.float32)

    def paint(along: Array, around: Array, _metres: Array) -> Array:
        shade = np.ones_like(along)
        back = np.abs(np.abs(from_front(around)) - math.pi)
        pocket = (along > 0.1) & (along < 0.48) & (back < 0.9)
        shade[pocket] = 0.82
        shade[np.abs(along - 0.5) < 0.03] = 0.5
        shade[np.abs(along - 0.8) < 0.025] = 0.6
        return base * shade[:, None]

    return paint
