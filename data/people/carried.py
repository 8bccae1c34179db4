"""Bags: on the back, across the body, over a shoulder, in a hand."""

from __future__ import annotations

from itertools import pairwise

from data.people import fabrics
from data.people.appearance import GARMENT_COLOURS, Person
from data.people.raster import Tube, limb, offset
from data.people.skeleton import Vector


def build_bag(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    """Return the bag of a person, with its straps; ``joints`` as of ``walking_joints``."""
    if person.bag == "none":
        return []
    colour = GARMENT_COLOURS[person.bag_colour]
    dark = fabrics.darker(colour, 0.7)
    pelvis, neck, side = joints["pelvis"], joints["neck"], float(person.side)
    strap, girth = fabrics.plain(dark), person.girth
    if person.bag == "backpack":
        back = -0.1 * girth - 0.085
        tubes = [
            Tube(
                pelvis + offset(0.1, back),
                neck + offset(-0.03, back),
                (0.125, 0.14, 0.14, 0.13, 0.1),
                (0.085, 0.1, 0.095, 0.08, 0.06),
                fabrics.knapsack(colour),
                caps=(0.03, 0.05),
            )
        ]
        for sign in (-1, 1):
            path = ((0.10, -0.04, 0.0), (0.115, -0.13, 0.125 * girth), (0.125, -0.27, 0.12 * girth))
            points = [neck + offset(y, z, sign * x) for x, y, z in path]
            tubes += [limb(a, b, (0.022, 0.022), strap) for a, b in pairwise(points)]
        return tubes
    if person.bag == "hand":
        hand = joints["hand_l" if side > 0 else "hand_r"] + offset(-0.1)
        return [
            limb(hand, hand + offset(-0.08), (0.016, 0.016), strap),
            Tube(
                hand + offset(-0.08),
                hand + offset(-0.3),
                (0.05, 0.065, 0.065),
                (0.13, 0.16, 0.15),
                fabrics.knapsack(colour),
                caps=(0.02, 0.03),
            ),
        ]
    hip = pelvis + offset(-0.02, -0.02, side * (0.17 * girth + 0.06))
    bag = Tube(
        hip + offset(0.12),
        hip + offset(-0.13),
        (0.055, 0.065, 0.06),
        (0.12, 0.15, 0.14),
        fabrics.knapsack(colour),
        caps=(0.02, 0.04),
    )
    cross = -side if person.bag == "messenger" else side
    top = neck + offset(-0.035, 0.0, cross * 0.1)
    tubes = [bag]
    for depth in (0.15 * girth, -0.15 * girth):
        middle = 0.5 * (top + hip) + offset(0.02, depth)
        tubes += [limb(top, middle, (0.02, 0.02), strap), limb(middle, hip, (0.02, 0.02), strap)]
    return tubes
