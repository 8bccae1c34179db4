"""A person as tubes: body, clothes, hair, shoes and bag on a walking skeleton."""

from __future__ import annotations

import math

import numpy as np

from data.people import fabrics
from data.people.appearance import GARMENT_COLOURS, Garment, Person
from data.people.carried import build_bag
from data.people.fabrics import from_front
from data.people.heads import build_head
from data.people.raster import Tube, limb, offset
from data.people.skeleton import Vector, walking_joints

_SHORT_SLEEVE = 0.62  # share of the upper arm


def build_figure(person: Person, phase: float) -> list[Tube]:
    """Return the tubes of a person of 1.70 m at a place in the gait cycle (radians)."""
    joints = walking_joints(
        phase,
        stride=person.stride * (0.8 if person.lower.cut in {"skirt", "gown"} else 1.0),
        lean=person.lean,
        shoulder=0.165 * person.shoulders * (0.7 + 0.3 * person.girth),
        carrying=person.side if person.bag == "hand" else 0,
    )
    return [
        *_legs(person, joints),
        *_trunk(person, joints, phase),
        *_arms(person, joints),
        *build_head(person, joints),
        *build_bag(person, joints),
    ]


def _legs(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    tubes = []
    girth, lower = 0.5 + 0.5 * person.girth, person.lower
    skin = fabrics.plain(person.skin)
    covered = lower.cut in {"skirt", "gown"}  # the skirt hides the thighs, however far they swing
    bare = covered or lower.cut == "shorts"
    widths = {"slim": (0.078, 0.052, 0.040), "wide": (0.098, 0.088, 0.098)}
    top, knee_width, hem = (girth * w for w in widths.get(lower.cut, (0.088, 0.068, 0.060)))
    for name, outside in (("l", 1), ("r", -1)):
        hip, knee, ankle = (joints[f"{part}_{name}"] for part in ("hip", "knee", "ankle"))
        cloth = fabrics.leg(lower, 0.0, outside)
        if bare:
            thigh, calf = 0.066 * girth, 0.048 * girth
            tubes.append(limb(hip, knee, (thigh * 1.15, calf * 1.1), skin, lift=-0.12 * covered))
            tubes.append(limb(knee, ankle, (calf, calf * 1.12, calf * 0.9, 0.034), skin))
        else:
            tubes.append(limb(hip, knee, (top, top, knee_width), cloth))
            shin = fabrics.leg(lower, 0.43, outside)
            tubes.append(
                limb(knee, ankle, (knee_width, (knee_width + hem) / 2, hem), shin, flat_end=True)
            )
        if lower.cut == "shorts":
            mid = hip + 0.9 * (knee - hip)
            tubes.append(limb(hip, mid, (top * 1.05, top * 1.02, top), cloth, flat_end=True))
        tubes.extend(_shoe(person, joints, name, bare or lower.cut == "slim"))
    return tubes


def _shoe(person: Person, joints: dict[str, Vector], name: str, over: bool) -> list[Tube]:
    heel, toe, ankle = (joints[f"{part}_{name}"] for part in ("heel", "toe", "ankle"))
    colour = GARMENT_COLOURS[person.shoes]
    sole = (40.0, 38.0, 36.0) if person.boots or person.shoes == "white" else (214.0, 212.0, 206.0)
    paint = fabrics.shoe(colour, sole=sole)
    radii = (0.044, 0.046, 0.043, 0.034)
    shoe = Tube(heel, toe, radii, radii, paint, caps=(0.036, 0.034), gloss=0.12)
    if not (person.boots and over):
        return [shoe]
    shaft = ankle + 0.62 * (joints[f"knee_{name}"] - ankle)
    return [shoe, limb(shaft, ankle, (0.062, 0.05, 0.052), fabrics.plain(colour))]


def _trunk(person: Person, joints: dict[str, Vector], phase: float) -> list[Tube]:
    pelvis, neck = joints["pelvis"], joints["neck"]
    girth, upper, lower = person.girth, person.upper, person.lower
    bulk = {"hoodie": 1.08, "jacket": 1.08, "coat": 1.1, "vest": 1.12}.get(upper.cut, 1.0)
    hips, waist, chest = 0.158 * girth, (0.128 + 0.05 * (girth - 1)) * girth, 0.163
    chest *= person.shoulders * (0.6 + 0.4 * girth)
    wide = tuple(
        bulk * w
        for w in (hips, waist, 0.5 * (waist + chest), chest, chest * 1.1, chest * 0.98, 0.075)
    )
    deep = tuple(
        bulk * d * (0.35 + 0.65 * girth) for d in (0.115, 0.105, 0.112, 0.122, 0.115, 0.092, 0.06)
    )
    cloth = lower if lower.cut == "gown" else upper
    opened = person.inner if upper.cut in {"jacket", "coat"} and cloth is upper else None
    paint = fabrics.trunk(cloth, phase, open_over=opened)
    tubes = [Tube(pelvis + offset(-0.055), neck, wide, deep, paint, caps=(0.02, 0.03))]
    seat = fabrics.leg(lower, 0.0, 1)
    tubes.append(
        Tube(
            pelvis + offset(0.02),
            pelvis + offset(-0.08),
            (0.92 * hips, hips, 0.9 * hips),
            (0.1 * girth, 0.115 * girth, 0.1 * girth),
            seat,
            caps=(0.01, 0.05),
        )
    )
    tubes.extend(_skirts(person, pelvis, phase, wide[0], deep[0]))
    if upper.cut == "hoodie" and cloth is upper:
        hood = fabrics.plain(GARMENT_COLOURS[upper.colour])
        tubes.append(
            Tube(
                neck + offset(-0.04, -0.085),
                neck + offset(0.03, -0.075),
                (0.1, 0.11, 0.09),
                (0.055, 0.06, 0.05),
                hood,
                caps=(0.05, 0.03),
            )
        )
    if upper.cut in {"shirt", "jacket", "coat"} and cloth is upper:
        collar = fabrics.plain(fabrics.darker(GARMENT_COLOURS[upper.colour], 0.82))
        tubes.append(
            Tube(
                neck + offset(-0.02),
                neck + offset(0.045, 0.01),
                (0.085, 0.07),
                (0.075, 0.068),
                collar,
                caps=(0.02, 0.005),
                cut=lambda _along, around: np.abs(from_front(around)) > 0.45,
            )
        )
    return tubes


def _skirts(person: Person, pelvis: Vector, phase: float, wide: float, deep: float) -> list[Tube]:
    """Skirt, gown and the tail of a coat: cones from the waist, wide enough for the stride."""
    sway = 0.02 * math.sin(2 * phase)
    tubes = []
    if person.lower.cut in {"skirt", "gown"}:
        top, hem = pelvis + offset(0.08), pelvis + offset(-0.44, sway)
        tubes.append(
            Tube(
                top,
                hem,
                (0.9 * wide, 1.08 * wide, 1.3 * wide, 1.45 * wide),
                (0.9 * deep, 1.15 * deep, 1.6 * deep, 1.95 * deep),
                fabrics.skirt(person.lower, phase),
                caps=(0.01, 0.02),
            )
        )
    if person.upper.cut == "coat" and person.lower.cut != "gown":
        upper = person.upper
        pattern = upper.pattern if upper.pattern in {"checks", "columns", "stripes"} else "plain"
        tail = Garment("coat", upper.colour, upper.second, pattern, upper.period)
        tubes.append(
            Tube(
                pelvis + offset(0.02),
                pelvis + offset(-0.36, sway),
                (wide, 1.1 * wide, 1.18 * wide),
                (deep, 1.3 * deep, 1.6 * deep),
                fabrics.skirt(tail, phase),
                caps=(0.02, 0.02),
                cut=lambda along, around: np.abs(from_front(around)) > 0.18 + 0.2 * along,
            )
        )
    return tubes


def _arms(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    tubes = []
    thick = 0.5 + 0.5 * person.girth
    cloth = person.lower if person.lower.cut == "gown" else person.upper
    short = cloth.cut in {"tee", "gown"}
    bulk = 1.2 if cloth.cut in {"hoodie", "jacket", "coat"} else 1.0
    contrast = cloth.cut == "vest"
    skin = fabrics.plain(person.skin)
    for name in ("l", "r"):
        root, elbow, hand = (joints[f"{part}_{name}"] for part in ("shoulder", "elbow", "hand"))
        upper, lower, wrist = 0.058 * thick * bulk, 0.044 * thick * bulk, 0.033 * thick * bulk
        cloth_paint = fabrics.sleeve(cloth, 0.0, contrast=contrast)
        if short:
            cuff = root + _SHORT_SLEEVE * (elbow - root)
            tubes.append(limb(root, elbow, (0.046 * thick, 0.04 * thick), skin))
            tubes.append(
                limb(
                    root,
                    cuff,
                    (0.86 * upper, 0.98 * upper, 1.02 * upper),
                    cloth_paint,
                    flat_end=True,
                )
            )
            tubes.append(limb(elbow, hand, (0.04 * thick, 0.028), skin))
        else:
            rest = fabrics.sleeve(cloth, 0.29, contrast=contrast)
            tubes.append(limb(root, elbow, (0.9 * upper, 0.95 * upper, lower), cloth_paint))
            tubes.append(limb(elbow, hand, (lower, wrist), rest, flat_end=True))
        reach = hand + 0.085 * (hand - elbow) / np.linalg.norm(hand - elbow)
        tubes.append(limb(hand, reach, (0.034, 0.036, 0.026), skin))
    return tubes
