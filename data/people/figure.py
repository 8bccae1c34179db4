"""A person as tubes: body, clothes, hair, shoes and bag on a walking skeleton."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data.people import appearance
from data.people.appearance import GARMENT_COLOURS, Garment, Person, from_front
from data.people.raster import Array, Tube, Vector, limb, offset

_SHORT_SLEEVE = 0.62  # share of the upper arm


def build_figure(person: Person, phase: float) -> list[Tube]:
    """Return the tubes of a person of 1.70 m at a phase of the gait cycle (radians)."""
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
        *_head(person, joints),
        *_bag(person, joints),
    ]


# fmt: off
# Each tube is a row of a table: ends, half-axes sideways and forward, paint, options.
def _legs(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    tubes = []
    girth, lower = 0.5 + 0.5 * person.girth, person.lower
    skin = appearance.plain(person.skin)
    covered = lower.cut in {"skirt", "gown"}  # the skirt hides the thighs
    bare = covered or lower.cut == "shorts"
    widths = {"slim": (0.078, 0.052, 0.040), "wide": (0.098, 0.088, 0.098)}
    top, knee_width, hem = (girth * w for w in widths.get(lower.cut, (0.088, 0.068, 0.060)))
    for name, outside in (("l", 1), ("r", -1)):
        hip, knee, ankle = (joints[f"{part}_{name}"] for part in ("hip", "knee", "ankle"))
        cloth = appearance.leg(lower, 0.0, outside)
        if bare:
            thigh, calf = 0.066 * girth, 0.048 * girth
            tubes.append(limb(hip, knee, (thigh * 1.15, calf * 1.1), skin, lift=-0.12 * covered))
            tubes.append(limb(knee, ankle, (calf, calf * 1.12, calf * 0.9, 0.034), skin))
        else:
            tubes.append(limb(hip, knee, (top, top, knee_width), cloth))
            shin = appearance.leg(lower, 0.43, outside)
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
    paint = appearance.shoe(colour, sole=sole)
    radii = (0.044, 0.046, 0.043, 0.034)
    shoe = Tube(heel, toe, radii, radii, paint, caps=(0.036, 0.034), gloss=0.12)
    if not (person.boots and over):
        return [shoe]
    shaft = ankle + 0.62 * (joints[f"knee_{name}"] - ankle)
    return [shoe, limb(shaft, ankle, (0.062, 0.05, 0.052), appearance.plain(colour))]


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
    paint = appearance.trunk(cloth, phase, open_over=opened)
    tubes = [Tube(pelvis + offset(-0.055), neck, wide, deep, paint, caps=(0.02, 0.03))]
    seat = appearance.leg(lower, 0.0, 1)
    tubes.append(
        Tube(pelvis + offset(0.02), pelvis + offset(-0.08), (0.92 * hips, hips, 0.9 * hips),
             (0.1 * girth, 0.115 * girth, 0.1 * girth), seat, caps=(0.01, 0.05))
    )
    tubes.extend(_skirts(person, pelvis, phase, wide[0], deep[0]))
    if upper.cut == "hoodie" and cloth is upper:
        hood = appearance.plain(GARMENT_COLOURS[upper.colour])
        tubes.append(
            Tube(neck + offset(-0.04, -0.085), neck + offset(0.03, -0.075), (0.1, 0.11, 0.09),
                 (0.055, 0.06, 0.05), hood, caps=(0.05, 0.03))
        )
    if upper.cut in {"shirt", "jacket", "coat"} and cloth is upper:
        collar = appearance.plain(appearance.darker(GARMENT_COLOURS[upper.colour], 0.82))
        tubes.append(
            Tube(neck + offset(-0.02), neck + offset(0.045, 0.01), (0.085, 0.07), (0.075, 0.068),
                 collar, caps=(0.02, 0.005),
                 cut=lambda _along, around: np.abs(from_front(around)) > 0.45)
        )
    return tubes


def _skirts(person: Person, pelvis: Vector, phase: float, wide: float, deep: float) -> list[Tube]:
    """Return skirt, gown and the lower part of a coat: cones that are wider than the stride."""
    sway = 0.02 * math.sin(2 * phase)
    tubes = []
    if person.lower.cut in {"skirt", "gown"}:
        top, hem = pelvis + offset(0.08), pelvis + offset(-0.44, sway)
        tubes.append(
            Tube(top, hem, (0.9 * wide, 1.08 * wide, 1.3 * wide, 1.45 * wide),
                 (0.9 * deep, 1.15 * deep, 1.6 * deep, 1.95 * deep),
                 appearance.skirt(person.lower, phase), caps=(0.01, 0.02))
        )
    if person.upper.cut == "coat" and person.lower.cut != "gown":
        upper = person.upper
        pattern = upper.pattern if upper.pattern in {"checks", "columns", "stripes"} else "plain"
        tail = Garment("coat", upper.colour, upper.second, pattern, upper.period)
        tubes.append(
            Tube(pelvis + offset(0.02), pelvis + offset(-0.36, sway),
                 (wide, 1.1 * wide, 1.18 * wide), (deep, 1.3 * deep, 1.6 * deep),
                 appearance.skirt(tail, phase), caps=(0.02, 0.02),
                 cut=lambda along, around: np.abs(from_front(around)) > 0.18 + 0.2 * along)
        )
    return tubes


def _arms(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    tubes = []
    thick = 0.5 + 0.5 * person.girth
    cloth = person.lower if person.lower.cut == "gown" else person.upper
    short = cloth.cut in {"tee", "gown"}
    bulk = 1.2 if cloth.cut in {"hoodie", "jacket", "coat"} else 1.0
    contrast = cloth.cut == "vest"
    skin = appearance.plain(person.skin)
    for name in ("l", "r"):
        root, elbow, hand = (joints[f"{part}_{name}"] for part in ("shoulder", "elbow", "hand"))
        upper, lower, wrist = 0.058 * thick * bulk, 0.044 * thick * bulk, 0.033 * thick * bulk
        cloth_paint = appearance.sleeve(cloth, 0.0, contrast=contrast)
        if short:
            cuff = root + _SHORT_SLEEVE * (elbow - root)
            tubes.append(limb(root, elbow, (0.046 * thick, 0.04 * thick), skin))
            tubes.append(
                limb(root, cuff, (0.86 * upper, 0.98 * upper, 1.02 * upper), cloth_paint,
                     flat_end=True)
            )
            tubes.append(limb(elbow, hand, (0.04 * thick, 0.028), skin))
        else:
            rest = appearance.sleeve(cloth, 0.29, contrast=contrast)
            tubes.append(limb(root, elbow, (0.9 * upper, 0.95 * upper, lower), cloth_paint))
            tubes.append(limb(elbow, hand, (lower, wrist), rest, flat_end=True))
        reach = hand + 0.085 * (hand - elbow) / np.linalg.norm(hand - elbow)
        tubes.append(limb(hand, reach, (0.034, 0.036, 0.026), skin))
    return tubes


def _head(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    """Return neck, head, hair and headgear; ``joints`` are those of ``walking_joints``."""
    neck, centre = joints["neck"], joints["head"]
    skin = appearance.plain(appearance.darker(person.skin, 0.86))
    profile_w, profile_d = (0.052, 0.07, 0.078, 0.078, 0.066), (0.06, 0.085, 0.094, 0.096, 0.08)
    chin, crown = centre + offset(-0.075, 0.008), centre + offset(0.07)
    tubes = [
        limb(neck + offset(-0.05), centre + offset(-0.05), (0.056, 0.05), skin),
        Tube(chin, crown, profile_w, profile_d, appearance.face(person.skin), caps=(0.035, 0.05)),
    ]
    return tubes + _hair(person, centre, joints)


def _hair(person: Person, centre: Vector, joints: dict[str, Vector]) -> list[Tube]:
    style = person.haircut
    paint = appearance.strands(person.hair, curly=style == "curly")
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
        Tube(centre + offset(low, -0.008), centre + offset(0.078, -0.006), wide, deep, paint,
             caps=(0.03, 0.052 * volume), cut=outside_face)
    ]
    if style == "long":
        tubes.append(
            Tube(centre + offset(0, -0.06), joints["neck"] + offset(-0.2, -0.1), (0.09, 0.11, 0.1),
                 (0.06, 0.05, 0.03), paint, caps=(0.03, 0.04))
        )
    elif style == "tail":
        tubes.append(
            limb(centre + offset(0.05, -0.11), centre + offset(-0.2, -0.15), (0.04, 0.045, 0.02),
                 paint)
        )
    elif style == "bun":
        bun = centre + offset(0.1, -0.075)
        tubes.append(limb(bun, bun + offset(0.02), (0.055, 0.055), paint))
    return tubes


def _headgear(person: Person, centre: Vector) -> list[Tube]:
    colour, hair = GARMENT_COLOURS[person.headgear], appearance.strands(person.hair)
    dark = appearance.darker(colour, 0.75)
    below = Tube(centre + offset(-0.045, -0.008), centre + offset(0.03), (0.08, 0.084),
                 (0.094, 0.1), hair, caps=(0.03, 0.02),
                 cut=lambda _along, around: np.abs(from_front(around)) > 1.2)
    hat = Tube(centre + offset(0.04), centre + offset(0.082), (0.09, 0.088, 0.076),
               (0.106, 0.104, 0.09), appearance.plain(colour), caps=(0.012, 0.055))
    if person.haircut == "cap":
        brim = Tube(centre + offset(0.045, 0.08), centre + offset(0.03, 0.17), (0.07, 0.055),
                    (0.02, 0.014), appearance.plain(dark), caps=(0.01, 0.02))
        return [below, hat, brim]
    cuff = Tube(centre + offset(0.02), centre + offset(0.055), (0.097, 0.097), (0.112, 0.112),
                appearance.plain(dark), caps=(0.008, 0.008))
    return [below, hat, cuff]


def _bag(person: Person, joints: dict[str, Vector]) -> list[Tube]:
    """Return the bag of a person and its straps; ``joints`` are those of ``walking_joints``."""
    if person.bag == "none":
        return []
    colour = GARMENT_COLOURS[person.bag_colour]
    dark = appearance.darker(colour, 0.7)
    pelvis, neck, side = joints["pelvis"], joints["neck"], float(person.side)
    strap, girth = appearance.plain(dark), person.girth
    if person.bag == "backpack":
        back = -0.1 * girth - 0.085
        tubes = [
            Tube(pelvis + offset(0.1, back), neck + offset(-0.03, back),
                 (0.125, 0.14, 0.14, 0.13, 0.1), (0.085, 0.1, 0.095, 0.08, 0.06),
                 appearance.knapsack(colour), caps=(0.03, 0.05))
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
            Tube(hand + offset(-0.08), hand + offset(-0.3), (0.05, 0.065, 0.065),
                 (0.13, 0.16, 0.15), appearance.knapsack(colour), caps=(0.02, 0.03)),
        ]
    hip = pelvis + offset(-0.02, -0.02, side * (0.17 * girth + 0.06))
    bag = Tube(hip + offset(0.12), hip + offset(-0.13), (0.055, 0.065, 0.06), (0.12, 0.15, 0.14),
               appearance.knapsack(colour), caps=(0.02, 0.04))
    cross = -side if person.bag == "messenger" else side
    top = neck + offset(-0.035, 0.0, cross * 0.1)
    tubes = [bag]
    for depth in (0.15 * girth, -0.15 * girth):
        middle = 0.5 * (top + hip) + offset(0.02, depth)
        tubes += [limb(top, middle, (0.02, 0.02), strap), limb(middle, hip, (0.02, 0.02), strap)]
    return tubes


# fmt: on
# Body axes: x to the person's left, y up, z forward. Lengths of a person of 1.70 m.
_HIP_Y, _THIGH, _SHIN, _ANKLE = 0.90, 0.43, 0.40, 0.07
_TRUNK, _UPPER_ARM, _FOREARM = 0.50, 0.29, 0.25


def _swing(angle: float, length: float, outward: float = 0.0) -> Vector:
    """Return a limb that hangs down, rotated forward and outward (radians)."""
    return length * np.array([math.sin(outward), -math.cos(angle), math.sin(angle)])


def walking_joints(
    phase: float, *, stride: float, lean: float, shoulder: float, carrying: int = 0
) -> dict[str, Vector]:
    """Return the joints of a walking person of 1.70 m: points in body axes by name.

    Names of joints on one side end in ``_l`` or ``_r``. Phase of the gait cycle, stride (amplitude
    of the thighs) and forward lean of the trunk are in radians, half the distance of the shoulders
    in metres. ``carrying`` is +1 or -1 if the left or right arm holds a bag and does not swing.
    """
    joints: dict[str, Vector] = {"pelvis": np.array([0.0, _HIP_Y, 0.0])}
    joints["neck"] = joints["pelvis"] + _TRUNK * np.array([0, math.cos(lean), math.sin(lean)])
    joints["head"] = joints["neck"] + np.array([0, 0.17, 0.02 + 0.1 * lean])
    for name, sign, shift in (("l", 1, 0.0), ("r", -1, math.pi)):
        swing = math.sin(phase + shift)
        thigh = stride * swing + 0.06
        # The knee bends while the leg swings forward, and slightly under load.
        bend = 0.10 + 1.5 * stride * max(0.0, math.cos(phase + shift)) + 0.25 * max(0.0, -swing)
        hip = joints["pelvis"] + np.array([sign * 0.088, 0, 0])
        knee = hip + _swing(thigh, _THIGH)
        ankle = knee + _swing(thigh - bend, _SHIN, 0.02 * sign)
        pitch = -0.9 * max(0.0, -swing) * stride + 0.35 * max(0.0, swing) * stride
        joints[f"hip_{name}"], joints[f"knee_{name}"], joints[f"ankle_{name}"] = hip, knee, ankle
        toe = np.array([0.03 * sign, -0.045 + 0.16 * math.sin(pitch), 0.17 * math.cos(pitch)])
        joints[f"heel_{name}"] = ankle + np.array([0, -0.035, -0.035])
        joints[f"toe_{name}"] = ankle + toe
        still = 0.15 if carrying == sign else 1.0
        arm = -0.85 * stride * swing * still
        elbow_bend = (0.25 + 0.35 * max(0.0, -swing)) * still
        root = joints["neck"] + np.array([sign * shoulder, -0.08, 0])
        elbow = root + _swing(arm, _UPPER_ARM, 0.16 * sign)
        joints[f"shoulder_{name}"], joints[f"elbow_{name}"] = root, elbow
        joints[f"hand_{name}"] = elbow + _swing(arm + elbow_bend, _FOREARM, 0.06 * sign)
    floor = min(joints["ankle_l"][1], joints["ankle_r"][1]) - _ANKLE
    return {name: point - np.array([0, floor, 0]) for name, point in joints.items()}
