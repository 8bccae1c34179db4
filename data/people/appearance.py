"""The attributes that identify a drawn person, and the colours of cloth, skin and hair.

A paint is a function of surface coordinates (along, around, metres), each (N,), that returns sRGB
(N, 3) in [0, 255].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.people.raster import Array, Paint

RGB = tuple[float, float, float]
LEAST_HEIGHT, MOST_HEIGHT = 1.52, 1.92  # metres

# sRGB in [0, 255]. The distances are larger than the colour casts of the cameras.
GARMENT_COLOURS: dict[str, RGB] = {
    "black": (34, 34, 38), "grey": (128, 130, 134), "white": (228, 228, 224), "red": (186, 36, 40),
    "wine": (98, 26, 44), "orange": (222, 118, 36), "yellow": (228, 192, 56), "olive": (96, 98, 48),
    "green": (40, 124, 66), "teal": (34, 128, 136), "sky": (124, 174, 218), "blue": (40, 72, 166),
    "navy": (30, 38, 78), "purple": (108, 58, 138), "pink": (220, 128, 158),
    "beige": (202, 178, 140), "brown": (104, 68, 44),
}  # fmt: skip
_LOWER = ("black", "grey", "navy", "blue", "beige", "brown", "olive", "white", "wine", "sky")
_SHOES = ("black", "white", "brown", "red", "blue", "grey", "yellow")
_BAGS = ("black", "red", "brown", "blue", "yellow", "green", "grey", "pink", "white")
_SKIN: tuple[RGB, ...] = (
    (241, 204, 178), (226, 180, 148), (204, 152, 116), (168, 116, 82), (124, 82, 58), (88, 58, 44),
)  # fmt: skip
_HAIR: tuple[RGB, ...] = (
    (28, 24, 24), (58, 40, 30), (104, 68, 40), (176, 132, 72), (150, 74, 40), (168, 168, 170),
)  # fmt: skip
_UPPERS = ("tee", "tee", "shirt", "shirt", "hoodie", "jacket", "jacket", "coat", "vest")
_LOWERS = ("slim", "straight", "straight", "wide", "shorts", "skirt", "gown")
_PATTERNS = ("plain", "plain", "plain", "stripes", "columns", "checks", "block", "band", "print",
             "sleeves", "diagonal")  # fmt: skip
_LOWER_PATTERNS = ("plain", "plain", "plain", "plain", "side", "checks", "faded")
_HAIRCUTS = ("short", "short", "long", "bob", "bun", "tail", "curly", "bald", "cap", "beanie")
_BAG_KINDS = ("none", "none", "backpack", "backpack", "shoulder", "messenger", "hand")


@dataclass(frozen=True)
class Garment:
    """A piece of clothing: cut, two colours and their pattern."""

    cut: str
    colour: str
    second: str
    pattern: str
    period: float  # metres


@dataclass(frozen=True)
class Person:
    """The attributes of a person, equal in all images."""

    height: float  # metres
    girth: float  # factor on the widths of trunk and limbs
    shoulders: float  # factor on the width of the shoulders
    skin: RGB  # sRGB in [0, 255]
    hair: RGB  # sRGB in [0, 255]
    haircut: str  # haircut or headgear; ``headgear`` is its colour
    headgear: str
    upper: Garment
    inner: str
    lower: Garment
    shoes: str  # colour of the shoes
    boots: bool  # whether the shoes are boots
    bag: str  # kind of bag
    bag_colour: str
    side: int  # side of the bag: +1 is the person's left
    stride: float  # amplitude of the legs' swing, radians
    lean: float  # forward lean of the trunk, radians


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _other(rng: np.random.Generator, choices: tuple[str, ...], *taken: str) -> str:
    """Pick a colour with enough contrast to those taken."""

    def contrast(name: str) -> float:
        values = np.asarray(GARMENT_COLOURS[name])
        return min(float(np.abs(values - GARMENT_COLOURS[t]).sum()) for t in taken)

    return _pick(rng, tuple(name for name in choices if contrast(name) > 150))


def _draw_person(rng: np.random.Generator) -> Person:
    names = tuple(GARMENT_COLOURS)
    upper_colour = _pick(rng, names)
    lower_colour = _pick(rng, _LOWER)
    boots = bool(rng.random() < 0.2)
    return Person(
        height=float(rng.uniform(LEAST_HEIGHT, MOST_HEIGHT)),
        girth=float(rng.uniform(0.86, 1.28)),
        shoulders=float(rng.uniform(0.9, 1.12)),
        skin=_SKIN[int(rng.integers(len(_SKIN)))],
        hair=_HAIR[int(rng.integers(len(_HAIR)))],
        haircut=_pick(rng, _HAIRCUTS),
        headgear=_pick(rng, names),
        upper=Garment(_pick(rng, _UPPERS), upper_colour, _other(rng, names, upper_colour),
                      _pick(rng, _PATTERNS), float(rng.uniform(0.11, 0.2))),
        inner=_other(rng, names, upper_colour),
        lower=Garment(_pick(rng, _LOWERS), lower_colour, _other(rng, names, lower_colour),
                      _pick(rng, _LOWER_PATTERNS), float(rng.uniform(0.11, 0.18))),
        shoes=_pick(rng, ("black", "brown") if boots else _SHOES),
        boots=boots,
        bag=_pick(rng, _BAG_KINDS),
        bag_colour=_other(rng, _BAGS, upper_colour),
        side=int(rng.choice([-1, 1])),
        stride=float(rng.uniform(0.28, 0.43)),
        lean=float(rng.uniform(0.0, 0.09)),
    )  # fmt: skip


# Weights of the attributes in the difference of two people; large garments count most.
_COLOUR_WEIGHTS = np.array([2.0, 1.5, 0.3])  # upper garment, lower garment, shoes
_KIND_WEIGHTS = np.array([1.0, 0.7, 0.8, 0.9, 0.4])  # pattern, cuts of both, bag, haircut
_FULL_CONTRAST = 180.0  # summed over the channels; larger contrasts count the same


class _Lineup:
    """The people drawn so far, as arrays, for the comparison with a new one."""

    def __init__(self, capacity: int) -> None:
        self._colours = np.zeros((capacity, 3, 3))
        self._kinds = np.zeros((capacity, 5), np.int64)
        self._codes: dict[tuple[str, ...], int] = {}
        self._count = 0

    def _encode(self, person: Person) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        colours = (person.upper.colour, person.lower.colour, person.shoes)
        kinds = (
            ("pattern", person.upper.pattern),
            ("upper", person.upper.cut),
            ("lower", person.lower.cut),
            ("bag", person.bag, "" if person.bag == "none" else person.bag_colour),
            ("haircut", person.haircut),
        )
        codes = [self._codes.setdefault(kind, len(self._codes)) for kind in kinds]
        return np.array([GARMENT_COLOURS[name] for name in colours]), np.array(codes)

    def least_difference(self, person: Person) -> float:
        """Return the difference to the most similar person; infinite for the first person."""
        if not self._count:
            return float("inf")
        colours, kinds = self._encode(person)
        contrast = np.abs(self._colours[: self._count] - colours).sum(2) / _FULL_CONTRAST
        different = self._kinds[: self._count] != kinds
        scores = np.minimum(contrast, 1) @ _COLOUR_WEIGHTS + different @ _KIND_WEIGHTS
        return float(scores.min())

    def add(self, person: Person) -> None:
        self._colours[self._count], self._kinds[self._count] = self._encode(person)
        self._count += 1


def draw_people(seed: int, count: int, *, apart: float = 2.8, attempts: int = 60) -> list[Person]:
    """Draw people with a minimum difference ``apart``, in the weights above, between any two.

    It is lowered for all following people after ``attempts`` unsuccessful draws, so that any count
    can be drawn. A larger count with the same seed begins with the same people.
    """
    people: list[Person] = []
    lineup = _Lineup(count)
    for index in range(count):
        rng = np.random.default_rng([seed, 11, index])
        tries, person = 1, _draw_person(rng)
        while lineup.least_difference(person) < apart:
            if tries % attempts == 0:
                apart -= 0.2
            tries, person = tries + 1, _draw_person(rng)
        people.append(person)
        lineup.add(person)
    return people


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

    ``folds`` is the phase of the folds, radians, ``open_over`` the colour of the shirt under a
    garment that is open in front.
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
