"""Privacy against utility: what stored images are good for, beside what attackers get from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from engine.attacks.charts import drawn
from engine.attacks.measures import Result
from engine.scoring.bootstrap import Interval

# What is run at each point: utility, and the two attackers.
UTILITY = {"anonymized": "reid-authorised", "desensitized": "reid-tuned"}
ATTACKERS = ("model", "reid-public")


@dataclass(frozen=True)
class FrontierPoint:
    """One way to protect.

    Attributes:
        name: What the chart calls it.
        level: ``anonymized`` or ``desensitized``.
        rank1: Stored query in stored gallery, by the network its owner would use.
        recovery_ssim: Of what the recovery attacker draws, against raw.
        recovery_floor: SSIM of a blind guess.
        unauthorised_rank1: Stored query in stored gallery, by a network that only saw raw images.
        unauthorised_floor: What luck reaches.
    """

    name: str
    level: str
    rank1: Interval
    recovery_ssim: Interval
    recovery_floor: Interval
    unauthorised_rank1: Interval
    unauthorised_floor: Interval

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def attacks_of(level: str) -> tuple[str, ...]:
    """Return the names of the attacks that a point of a level needs."""
    return (UTILITY[level], *ATTACKERS)


def frontier_point(name: str, level: str, results: Sequence[Result]) -> FrontierPoint:
    """Take what the frontier shows from the results of ``attacks_of(level)``."""
    by_attack: Mapping[str, Result] = {result.attack: result for result in results}
    recovery = by_attack["model"].measure("ssim")
    public = by_attack["reid-public"].measure("rank1")
    return FrontierPoint(
        name,
        level,
        by_attack[UTILITY[level]].measure("rank1").value,
        recovery.value,
        recovery.floor,
        public.value,
        public.floor,
    )


def frontier_chart(points: Sequence[FrontierPoint]) -> Image.Image:
    """Draw utility upwards and what each of the two attackers reaches to the right."""
    figure = Figure(figsize=(11, 4.8), dpi=110)
    left, right = figure.subplots(1, 2, sharey=True)
    _cloud(left, points, "recovery_ssim", "recovery_floor")
    _cloud(right, points, "unauthorised_rank1", "unauthorised_floor")
    left.set_xlabel("recovery attacker: SSIM of what he draws")
    right.set_xlabel("unauthorised network: rank-1, stored -> stored")
    left.set_ylabel("utility: rank-1, stored -> stored")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle("Privacy and utility: the better, the further up and to the left", fontsize=11)
    return drawn(figure)


def table(points: Sequence[FrontierPoint]) -> str:
    """Return the points as a table with their 95 % intervals."""
    width = max(len("protection"), *(len(point.name) for point in points)) + 2
    titles = ("rank-1 (utility)", "recovery SSIM", "unauthorised rank-1")
    lines = [f"{'protection':<{width}}" + "".join(f"{title:>22}" for title in titles)]
    for point in points:
        found = (point.rank1, point.recovery_ssim, point.unauthorised_rank1)
        cells = (f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in found)
        lines.append(f"{point.name:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cloud(ax: Axes, points: Sequence[FrontierPoint], value: str, floor: str) -> None:
    for place, point in enumerate(points):
        x: Interval = getattr(point, value)
        y, colour = point.rank1, f"C{place % 10}"
        ax.errorbar(
            x.value, y.value,
            xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
            yerr=[[max(0.0, y.value - y.low)], [max(0.0, y.high - y.value)]],
            fmt="o" if point.level == "anonymized" else "s", color=colour, capsize=3, ms=6,
            label=point.name,
        )  # fmt: skip
    luck = sum(getattr(point, floor).value for point in points) / len(points)
    ax.axvline(luck, color="#9a9a9a", ls="--", lw=1.5, label="what luck reaches")
    ax.set_ylim(-0.03, 1.03)
    ax.grid(alpha=0.25)
