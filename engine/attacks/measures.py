"""What an attack found: measures beside their floors, a verdict, and a sentence for everybody.

How much of what an attacker reached is more than luck: intervals, and the floor below them.

Intervals are 95 % bootstrap intervals over persons. Floors are measured, not assumed: the same
attack is scored on answers that were dealt to the wrong persons. Where the stored images carry
nothing about the person, right and wrong deals cannot be told apart, whatever the network or the
picture prior; so no bias of an attack can pass for a leak, and none can hide one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.scoring.bootstrap import Interval, bootstrap_ratios
from engine.scoring.image_quality import QualityAccumulator
from utils.seeding import numpy_generator

# Beside the results: tells a folder of attacks from that of a training.
SETTINGS_NAME = "settings.json"

# Values that differ by less differ by rounding: where a network draws one picture for everybody,
# value and floor are the same number, computed in two ways.
_RESOLUTION = 1e-6

HOLDS, FAILS, NOT_APPLICABLE = "holds", "fails", "not applicable"


@dataclass(frozen=True)
class Measure:
    """One number that an attack reached, beside what is reached without any information.

    Attributes:
        name: What it is, e.g. ``rank1``.
        unit: ``rate``, ``dB``, ``ssim``, ``r`` or ``s``.
        value: What the attack reached, with its 95 % interval over persons.
        floor: What a guess reaches, with its own interval.
        decides: Whether the verdict depends on it.
        bad_side: On which side of the floor the protection has failed: ``above`` (what the attacker
            gains) or ``below`` (what the owner loses).
        floor_is_exact: The floor is known, not measured: what lies beyond it cannot be luck, be it
            a single image of a single person.
    """

    name: str
    unit: str
    value: Interval
    floor: Interval
    decides: bool = False
    bad_side: str = "above"
    floor_is_exact: bool = False

    @property
    def beyond_floor(self) -> bool:
        """Whether the value's interval lies wholly on the bad side of the floor's interval.

        Where the floor is exact the value itself decides. Its interval over persons would reach the
        floor as soon as some resample misses the few persons whose images were opened.
        """
        if self.floor_is_exact:
            value, floor = self.value.value, self.floor.value
            return value < floor if self.bad_side == "below" else value > floor
        if self.bad_side == "below":
            return self.value.high < self.floor.low - _RESOLUTION
        return self.value.low > self.floor.high + _RESOLUTION


@dataclass(frozen=True)
class Point:
    """The measures at one place of a curve, e.g. for one data budget."""

    x: float
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Result:
    """One attack on one level.

    Attributes:
        attack, level: What was attacked, how.
        sentence: What it means, for a privacy officer.
        measures: What was measured; empty where the attack does not apply.
        applies: Whether the attack can be run on the level at all; otherwise the sentence says why.
        seed: What everything of the attacker is drawn from.
        budget: What the attacker may use, in ``budget_unit``.
        budget_unit: E.g. ``public images`` or ``keys tried``.
        num_persons, num_images: Private persons and images that it was scored on.
        curve_of: What ``curve`` runs over; empty without one.
        curve: The measures along it.
        details: Further facts by name, plain values.
    """

    attack: str
    level: str
    sentence: str
    measures: tuple[Measure, ...] = ()
    applies: bool = True
    seed: int = 0
    budget: int = 0
    budget_unit: str = ""
    num_persons: int = 0
    num_images: int = 0
    curve_of: str = ""
    curve: tuple[Point, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """``fails`` as soon as one deciding measure lies beyond its floor."""
        if not self.applies:
            return NOT_APPLICABLE
        return FAILS if any(m.decides and m.beyond_floor for m in self.measures) else HOLDS

    def measure(self, name: str) -> Measure:
        """Return a measure by name."""
        return next(measure for measure in self.measures if measure.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the verdict among them."""
        content = asdict(self)
        content["measures"] = [_plain(measure) for measure in self.measures]
        content["curve"] = [
            {"x": point.x, "measures": [_plain(measure) for measure in point.measures]}
            for point in self.curve
        ]
        content["details"] = dict(self.details)
        return content | {"verdict": self.verdict}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """Read :meth:`to_json` back.

        Raises:
            KeyError, TypeError, ValueError: It is not of that form.
        """
        values = {name: value for name, value in content.items() if name != "verdict"}
        values["measures"] = _measures(content["measures"])
        values["curve"] = tuple(
            Point(point["x"], _measures(point["measures"])) for point in content["curve"]
        )
        return cls(**values)


def not_applicable(attack: str, level: str, reason: str) -> Result:
    """Return the result of an attack that a level gives nothing to."""
    return Result(attack, level, reason, applies=False)


def exactly(value: float) -> Interval:
    """Return a number that is known without error."""
    return Interval(value, value, value)


def _plain(measure: Measure) -> dict[str, Any]:
    content = asdict(measure) | {"beyond_floor": measure.beyond_floor}
    for name in ("value", "floor"):
        content[name] = {k: _finite(v) for k, v in content[name].items()}
    return content


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _measures(contents: Sequence[Mapping[str, Any]]) -> tuple[Measure, ...]:
    found = []
    for content in contents:
        values = {name: value for name, value in content.items() if name != "beyond_floor"}
        for name in ("value", "floor"):
            numbers = {k: math.nan if v is None else float(v) for k, v in values[name].items()}
            values[name] = Interval(**numbers)
        found.append(Measure(**values))
    return tuple(found)


# One image equal to its target would make every mean infinite; float32 ends near 158 dB.
PSNR_CAP_DB = 200.0
_IMAGE_DEALS = 12

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


def interval_of(values: ArrayLike, pids: Tensor, seed: int) -> Interval:
    """Return the mean of one value per image with its interval over persons."""
    column = np.asarray(values, np.float64).reshape(-1, 1)
    (found,) = bootstrap_ratios(column, np.ones(len(column)), pids.cpu().numpy(), seed=seed)
    return found


def deal_interval(means: ArrayLike) -> Interval:
    """Return the mean over deals, and between which bounds 95 % of them lie."""
    values = np.asarray(means, np.float64)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def deal_to_others(pids: Tensor, deals: int, rng: np.random.Generator) -> Places:
    """Return for each deal and image the place of an image of somebody else (deals, N)."""
    people = pids.cpu().numpy()
    dealt = np.empty((deals, len(people)), np.int64)
    for person in np.unique(people):
        mine, others = np.flatnonzero(people == person), np.flatnonzero(people != person)
        dealt[:, mine] = rng.choice(others, (deals, len(mine)))
    return dealt


def quality(truth: Tensor, images: Tensor) -> tuple[Floats, Floats]:
    """Return PSNR (dB) and SSIM of each image; both (N, 3, H, W) are cut to [0, 1] first.

    What is no number counts as grey, which an attacker would put there: one NaN would make all
    means NaN, and those lie beyond no floor.
    """
    if not len(truth):
        return np.zeros(0), np.zeros(0)
    accumulator = QualityAccumulator()
    drawn = images.nan_to_num(0.5, posinf=1.0, neginf=0.0).expand_as(truth).clamp(0, 1)
    accumulator.update(truth.clamp(0, 1), drawn)
    found = accumulator.per_image()
    psnr = np.minimum(found.psnr_db.cpu().numpy(), PSNR_CAP_DB)
    return psnr, found.ssim.cpu().numpy()


def image_measures(
    attacked: Tensor,
    truth: Tensor,
    guess: Tensor,
    pids: Tensor,
    seed: int,
    *,
    with_others: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Measure, ...]:
    """Score pictures that an attacker made of N stored images.

    Args:
        attacked: His pictures, values in [0, 1] (N, 3, H, W).
        truth: What they should show (N, 3, H, W).
        guess: What somebody who does not see the stored image would answer, (1, 3, H, W) or one
            for each, such as the mean public picture.
        pids: Person of each image (N,).
        seed: Of resampling and dealing.
        with_others: Repeats the attack with stored images of other persons, at these places (N,),
            in place of the own ones; all else that the attacker knows stays. Left out: his pictures
            depend on nothing else, and are dealt themselves.

    Returns:
        ``psnr`` and ``ssim`` beside those of the guess, and what decides: ``psnr_own_gain`` and
        ``ssim_own_gain``, how much closer each picture is to its own target than pictures that the
        attacker made of other persons' stored images are.
    """
    psnr, ssim = quality(truth, attacked)
    guessed = quality(truth, guess)
    rng = numpy_generator(seed, "deals of pictures")
    dealt = deal_to_others(pids, _IMAGE_DEALS, rng)
    remade = with_others or (lambda places: attacked[places])
    others = np.array([quality(truth, remade(torch.from_numpy(deal))) for deal in dealt])
    measures = []
    for kind, (name, unit, own) in enumerate((("psnr", "dB", psnr), ("ssim", "ssim", ssim))):
        value, floor = (interval_of(v, pids, seed) for v in (own, guessed[kind]))
        measures.append(Measure(name, unit, value, floor))
        means = others[:, kind]  # (deals, N)
        gain = interval_of(own - means.mean(0), pids, seed)
        # A deal against the mean of the others, as the own answer is against the mean of all.
        rest = (means.sum(0) - means) / (_IMAGE_DEALS - 1)
        chance = deal_interval((means - rest).mean(1))
        measures.append(Measure(f"{name}_own_gain", unit, gain, chance, decides=True))
    return tuple(measures)


def share_measure(
    name: str, values: ArrayLike, pids: Tensor, seed: int, floor: float = 0.0
) -> Measure:
    """Return a share of images, or a rate per image, beside a floor that is known exactly."""
    known = Interval(floor, floor, floor)
    value = interval_of(values, pids, seed)
    return Measure(name, "rate", value, known, decides=True, floor_is_exact=True)
