"""The attributes that identify a drawn person: body, hair, garments, shoes and bag."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RGB = tuple[float, float, float]
LEAST_HEIGHT, MOST_HEIGHT = 1.52, 1.92  # metres

# sRGB in [0, 255]. The distances are larger than the colour casts of the cameras.
GARMENT_COLOURS: dict[str, RGB] = {
    "black": (34, 34, 38),
    "grey": (128, 130, 134),
    "white": (228, 228, 224),
    "red": (186, 36, 40),
    "wine": (98, 26, 44),
    "orange": (222, 118, 36),
    "yellow": (228, 192, 56),
    "olive": (96, 98, 48),
    "green": (40, 124, 66),
    "teal": (34, 128, 136),
    "sky": (124, 174, 218),
    "blue": (40, 72, 166),
    "navy": (30, 38, 78),
    "purple": (108, 58, 138),
    "pink": (220, 128, 158),
    "beige": (202, 178, 140),
    "brown": (104, 68, 44),
}
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
    """The attributes of a person, equal in all images.

    Attributes:
        height: Metres.
        girth: Factor on the widths of trunk and limbs.
        shoulders: Factor on the width of the shoulders.
        skin, hair: sRGB in [0, 255].
        haircut: Haircut or headgear; ``headgear`` is its colour.
        upper, lower: Garments; ``inner`` is the colour of the shirt under an open garment.
        shoes, boots: Colour of the shoes, and whether they are boots.
        bag, bag_colour, side: Kind and colour of the bag, and its side: +1 is the person's left.
        stride: Amplitude of the legs' swing, radians.
        lean: Forward lean of the trunk, radians.
    """

    height: float
    girth: float
    shoulders: float
    skin: RGB
    hair: RGB
    haircut: str
    headgear: str
    upper: Garment
    inner: str
    lower: Garment
    shoes: str
    boots: bool
    bag: str
    bag_colour: str
    side: int
    stride: float
    lean: float


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
    """Draw people with a minimum difference between any two.

    Args:
        seed: Seed. A larger count with the same seed begins with the same people.
        count: Number of people.
        apart: Minimum difference, in the weights above. It is lowered for all following people
            after ``attempts`` unsuccessful draws, so that any count can be drawn.
        attempts: Draws before the minimum difference is lowered.

    Returns:
        ``count`` people.
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
