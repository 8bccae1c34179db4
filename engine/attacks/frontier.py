"""The trade-off between utility of stored images and success of attackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from engine.attacks.charts import render
from engine.attacks.foreign import PREFIX
from engine.attacks.measures import Result
from engine.scoring.bootstrap import Interval

# Attacks of each point: utility, and two attackers.
UTILITY = {"anonymized": "reid-authorised", "desensitized": "reid-tuned"}
ATTACKERS = ("model", "reid-public")


@dataclass(frozen=True)
class FrontierPoint:
    """One kind of protection.

    Attributes:
        name: Name in the chart.
        level: ``anonymized`` or ``desensitized``.
        rank1: Stored -> stored, by the network that the owner would use.
        recovery_ssim: SSIM of the recovery attacker's images against raw.
        recovery_floor: SSIM of a guess without the image.
        unauthorised_rank1: Stored -> stored, by the strongest unauthorised network: one trained on
            raw images only, or a third-party network.
        unauthorised_floor: Its score by chance.
        unauthorised_attack: Name of that attack.
    """

    name: str
    level: str
    rank1: Interval
    recovery_ssim: Interval
    recovery_floor: Interval
    unauthorised_rank1: Interval
    unauthorised_floor: Interval
    unauthorised_attack: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def attacks_of(level: str) -> tuple[str, ...]:
    """Return the names of the attacks that a point of a level needs."""
    return (UTILITY[level], *ATTACKERS)


def frontier_point(name: str, level: str, results: Sequence[Result]) -> FrontierPoint:
    """Return the point of the results of ``attacks_of(level)`` and of third-party networks."""
    by_attack: Mapping[str, Result] = {result.attack: result for result in results}
    recovery = by_attack["model"].measure("ssim")
    networks = {
        attack: result.measure("rank1")
        for attack, result in by_attack.items()
        if attack == "reid-public" or attack.startswith(PREFIX)
    }
    strongest = max(networks, key=lambda attack: networks[attack].value.value)
    return FrontierPoint(
        name,
        level,
        by_attack[UTILITY[level]].measure("rank1").value,
        recovery.value,
        recovery.floor,
        networks[strongest].value,
        networks[strongest].floor,
        strongest,
    )


def frontier_chart(points: Sequence[FrontierPoint]) -> Image.Image:
    """Return a chart of utility (vertical) against two attackers (horizontal)."""
    figure = Figure(figsize=(11, 4.8), dpi=110)
    left, right = figure.subplots(1, 2, sharey=True)
    _cloud(left, points, "recovery_ssim", "recovery_floor")
    _cloud(right, points, "unauthorised_rank1", "unauthorised_floor")
    left.set_xlabel("recovery attacker: SSIM")
    right.set_xlabel("unauthorised network: rank-1, stored -> stored")
    left.set_ylabel("utility: rank-1, stored -> stored")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle("Privacy and utility: better is up and to the left", fontsize=11)
    return render(figure)


def table(points: Sequence[FrontierPoint]) -> str:
    """Return the points as a table with their 95 % intervals."""
    width = max(len("protection"), *(len(point.name) for point in points)) + 2
    titles = ("rank-1 (utility)", "recovery SSIM", "unauthorised rank-1")
    lines = [f"{'protection':<{width}}" + "".join(f"{title:>22}" for title in titles)]
    for point in points:
        intervals = (point.rank1, point.recovery_ssim, point.unauthorised_rank1)
        cells = (f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in intervals)
        lines.append(f"{point.name:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def _cloud(ax: Axes, points: Sequence[FrontierPoint], value: str, floor: str) -> None:
    for index, point in enumerate(points):
        x: Interval = getattr(point, value)
        y, colour = point.rank1, f"C{index % 10}"
        ax.errorbar(
            x.value, y.value,
            xerr=[[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]],
            yerr=[[max(0.0, y.value - y.low)], [max(0.0, y.high - y.value)]],
            fmt="o" if point.level == "anonymized" else "s", color=colour, capsize=3, ms=6,
            label=point.name,
        )  # fmt: skip
    chance = sum(getattr(point, floor).value for point in points) / len(points)
    ax.axvline(chance, color="#9a9a9a", ls="--", lw=1.5, label="chance")
    ax.set_ylim(-0.03, 1.03)
    ax.grid(alpha=0.25)
