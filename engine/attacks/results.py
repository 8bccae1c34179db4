"""What an attack found: measures beside their floors, a verdict, and a sentence for everybody."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.scoring.bootstrap import Interval

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
