"""Heads: face, hair in its cut, and headgear."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.people import fabrics
from data.people.appearance import GARMENT_COLOURS, Person
from data.people.fabrics import from_front
from data.people.raster import Array, Tube, limb, offset
from data.people.skeleton import Vector


def build_head(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    """Return neck, head, hair and headgear; ``joints`` as of ``walking_joints``."""
    neck, centre = joints["neck"], joints["head"]
    skin = fabrics.plain(fabrics.darker(person.skin, 0.86))
    profile_w, profile_d = (0.052, 0.07, 0.078, 0.078, 0.066), (0.06, 0.085, 0.094, 0.096, 0.08)
    chin, crown = centre + offset(-0.075, 0.008), centre + offset(0.07)
    tubes = [
        limb(neck + offset(-0.05), centre + offset(-0.05), (0.056, 0.05), skin),
        Tube(chin, crown, profile_w, profile_d, fabrics.face(person.skin), caps=(0.035, 0.05)),
    ]
    return tubes + _hair(person, centre, joints)


def _hair(person: Person, centre: Vector, joints: dict[str, Vector]) -> list[Tube]:
    style = person.haircut
    paint = fabrics.strands(person.hair, curly=style == "curly")
    if style in {"cap", "beanie"}:
        return _headgear(person, centre)
    if style == "bald":
        return []

    def outside_face(along: Array, around: Array) -> NDArray[np.bool_]:
        opening = 0.85 if style in {"long", "bob", "curly"} else 1.15
        return (np.abs(from_front(around)) > opening) | (along > 0.8)

    volume = {"curly": 1.32, "bob": 1.2, "long": 1.15}.get(style, 1.08)
    low = -0.1 if style in {"bob", "long"} else -0.045
    wide = tuple(volume * w for w in (0.06, 0.078, 0.082, 0.08, 0.066))
    deep = tuple(volume * d for d in (0.07, 0.094, 0.1, 0.099, 0.082))
    tubes = [
        Tube(
            centre + offset(low, -0.008),
            centre + offset(0.078, -0.006),
            wide,
            deep,
            paint,
            caps=(0.03, 0.052 * volume),
            cut=outside_face,
        )
    ]
    if style == "long":
        tubes.append(
            Tube(
                centre + offset(0, -0.06),
                joints["neck"] + offset(-0.2, -0.1),
                (0.09, 0.11, 0.1),
                (0.06, 0.05, 0.03),
                paint,
                caps=(0.03, 0.04),
            )
        )
    elif style == "tail":
        tubes.append(
            limb(
                centre + offset(0.05, -0.11),
                centre + offset(-0.2, -0.15),
                (0.04, 0.045, 0.02),
                paint,
            )
        )
    elif style == "bun":
        bun = centre + offset(0.1, -0.075)
        tubes.append(limb(bun, bun + offset(0.02), (0.055, 0.055), paint))
    return tubes


def _headgear(person: Person, centre: Vector) -> list[Tube]:
    colour, hair = GARMENT_COLOURS[person.headgear], fabrics.strands(person.hair)
    dark = fabrics.darker(colour, 0.75)
    below = Tube(
        centre + offset(-0.045, -0.008),
        centre + offset(0.03),
        (0.08, 0.084),
        (0.094, 0.1),
        hair,
        caps=(0.03, 0.02),
        cut=lambda _along, around: np.abs(from_front(around)) > 1.2,
    )
    hat = Tube(
        centre + offset(0.04),
        centre + offset(0.082),
        (0.09, 0.088, 0.076),
        (0.106, 0.104, 0.09),
        fabrics.plain(colour),
        caps=(0.012, 0.055),
    )
    if person.haircut == "cap":
        brim = Tube(
            centre + offset(0.045, 0.08),
            centre + offset(0.03, 0.17),
            (0.07, 0.055),
            (0.02, 0.014),
            fabrics.plain(dark),
            caps=(0.01, 0.02),
        )
        return [below, hat, brim]
    cuff = Tube(
        centre + offset(0.02),
        centre + offset(0.055),
        (0.097, 0.097),
        (0.112, 0.112),
        fabrics.plain(dark),
        caps=(0.008, 0.008),
    )
    return [below, hat, cuff]
