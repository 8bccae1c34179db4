"""Plot the trade-off between utility of stored images and success of attackers."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from configs import loading
from engine.attacks.charts import render
from engine.attacks.foreign import PREFIX, foreign_attacks
from engine.attacks.measures import Result
from engine.attacks.suite import Suite, chosen_attacks
from engine.distributed.processes import refuse_sharing
from engine.scoring.intervals import Interval
from engine.views import save_image
from tools.lib.attacking import add_settings, checkpoint_config, make_plan, prepare_output
from tools.lib.command_line import Parser, Show, add_json, answer, exit_code_of, number
from utils.device import set_threads
from utils.errors import UserError
from utils.files import locked_folder, write_text
from utils.logger import setup_logger

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z][A-Z0-9_]*)+")
_EXAMPLES = """examples:
  python3 tools/frontier.py --checkpoint demo/without demo/full --output frontier
  python3 tools/frontier.py --checkpoint demo/full --strength 4 8 16 --output frontier
  python3 tools/frontier.py --checkpoint demo/full --strength 4 8 16 --budget 256 --epochs 4
  python3 tools/frontier.py --checkpoint log/a log/b DATASETS.ROOT_DIR /data

Each checkpoint (mode GCR) gives a point for its anonymized images, searched by its own re-ID
network. Each --strength gives a point for images desensitized by INPUT.TYPE with that radius,
searched by a network trained on such public images. The output folder contains frontier.png,
frontier.json, table.txt, and a folder for each point. The same command continues an interrupted
run.
"""
# Attacks of each point: utility, and two attackers.
UTILITY = {"anonymized": "reid-authorised", "desensitized": "reid-tuned"}
ATTACKERS = ("model", "reid-public")


@dataclass(frozen=True)
class FrontierPoint:
    """One kind of protection."""

    name: str  # name in the chart
    level: str  # ``anonymized`` or ``desensitized``
    rank1: Interval  # stored -> stored, by the network that the owner would use
    recovery_ssim: Interval  # SSIM of the recovery attacker's images against raw
    recovery_floor: Interval  # SSIM of a guess without the image
    # stored -> stored, by the strongest unauthorised network: one trained on raw images only, or a
    # third-party network
    unauthorised_rank1: Interval
    unauthorised_floor: Interval  # its score by chance
    unauthorised_attack: str  # name of that attack


def frontier_point(name: str, level: str, results: Sequence[Result]) -> FrontierPoint:
    """Return the point of the results of the attacks on a level, and of third-party networks."""
    by_attack = {result.attack: result for result in results}
    recovery = by_attack["model"].measure("ssim")
    networks = {
        attack: result.measure("rank1")
        for attack, result in by_attack.items()
        if attack == "reid-public" or attack.startswith(PREFIX)
    }
    strongest = max(networks, key=lambda attack: networks[attack].value.value)
    utility, network = by_attack[UTILITY[level]].measure("rank1"), networks[strongest]
    return FrontierPoint(
        name, level, utility.value, recovery.value, recovery.floor, network.value, network.floor,
        strongest,
    )  # fmt: skip


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


@dataclass(frozen=True)
class Protection:
    """One kind of protection."""

    name: str  # name in charts
    level: str  # ``anonymized`` or ``desensitized``
    checkpoint: Path  # training with the networks and the data
    overrides: tuple[str, ...]  # keys that differ from its configuration

    @property
    def folder(self) -> str:
        """Name of the point's folder in the output folder."""
        return _folder(self.name)


def _folder(name: str) -> str:
    return name.replace(" ", "_")


def protections(
    checkpoints: Sequence[Path], strengths: Sequence[float], opts: Sequence[str]
) -> list[Protection]:
    """Return a protection for each checkpoint and each strength.

    Raises:
        UserError: A checkpoint or a strength is given twice, or cannot be used.
    """
    desensitized = []
    for strength in strengths:
        cfg, _ = checkpoint_config(checkpoints[0], opts)
        overrides = (*opts, "INPUT.RADIUS", f"{strength:g}")
        name = f"{cfg.INPUT.TYPE} {strength:g}"
        desensitized.append(Protection(name, "desensitized", checkpoints[0], overrides))
    taken = [point.folder for point in desensitized]
    points = [
        Protection(_name(path, checkpoints, taken), "anonymized", path, tuple(opts))
        for path in checkpoints
    ]
    points += desensitized
    folders = [point.folder for point in points]
    for point in points:
        if folders.count(point.folder) > 1:
            raise UserError(
                f"{point.name!r} is given twice; expected each checkpoint and strength once"
            )
    for point in points:  # fail now, not hours later
        checkpoint_config(point.checkpoint, point.overrides)
    return points


def _name(path: Path, all_paths: Sequence[Path], taken: Sequence[str]) -> str:
    """Return the last parts of a path, as few as give each point a folder of its own."""
    every = [other.resolve().parts for other in all_paths]
    parts = path.resolve().parts
    for depth in range(1, len(parts)):
        name = "-".join(parts[-depth:])
        folders = [*taken, *(_folder("-".join(each[-depth:])) for each in every)]
        if folders.count(_folder(name)) == 1:
            return name
    return path.resolve().name  # the same checkpoint twice


def measure(
    protection: Protection, args: argparse.Namespace
) -> tuple[FrontierPoint, dict[str, Any]]:
    """Run the attacks of one point, or read them; return it and its folder, settings, versions."""
    cfg, start = checkpoint_config(protection.checkpoint, protection.overrides)
    set_threads(cfg.RUNTIME.THREADS)
    suite = Suite(args.output / protection.folder, make_plan(cfg, start, (protection.level,), args))
    loading.dump(cfg, suite.folder / "config.yml")
    foreign = foreign_attacks(args.foreign)
    names = [UTILITY[protection.level], *ATTACKERS, *(attack.name for attack in foreign)]
    results = suite.run(chosen_attacks(names, foreign))
    origin = {"folder": protection.folder, "settings": suite.record, "versions": suite.versions()}
    return frontier_point(protection.name, protection.level, results), origin


def frontier(args: argparse.Namespace, show: Show) -> None:
    """Measure all points and draw them."""
    logger = setup_logger(args.output)
    wanted = protections(args.checkpoint, args.strength, args.opts)
    for protection in wanted:
        prepare_output(args.output / protection.folder)
    measured = [measure(protection, args) for protection in wanted]
    points = [point for point, _ in measured]
    save_image(frontier_chart(points), args.output / "frontier.png")
    content = [asdict(point) | origin for point, origin in measured]
    write_text(args.output / "frontier.json", json.dumps(content, indent=2) + "\n")
    write_text(args.output / "table.txt", table(points) + "\n")
    logger.info("\n%s", table(points))
    logger.info("The chart is %s", args.output / "frontier.png")
    show(content)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(description=__doc__, epilog=_EXAMPLES)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, nargs="+", metavar="DIR",
        help="OUTPUT_DIRs of trainings with MODEL.MODE GCR",
    )  # fmt: skip
    parser.add_argument(
        "--strength", type=number(0, 4096), nargs="+", default=[], metavar="RADIUS",
        help="values of INPUT.RADIUS: a point for each, without an anonymizer",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("frontier"), metavar="DIR",
        help="folder for results (default: frontier)",
    )  # fmt: skip
    add_settings(parser)
    add_json(parser)
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys that override config.yml; they come last"
    )
    given = sys.argv[1:] if argv is None else argv
    # Some options take lists, which would include the keys.
    first_key = next((i for i, word in enumerate(given) if _KEY.fullmatch(word)), len(given))
    args = parser.parse_args(given[:first_key])
    args.opts = [*args.opts, *given[first_key:]]

    def work() -> None:
        refuse_sharing("tools/frontier.py")
        with locked_folder(args.output), answer(as_json=args.json) as show:
            frontier(args, show)

    return exit_code_of(work, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
