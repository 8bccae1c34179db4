"""Plot the trade-off between utility of stored images and success of attackers."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from configs import loading
from engine.attacks.foreign import foreign_attacks
from engine.attacks.frontier import (
    FrontierPoint,
    attacks_of,
    frontier_chart,
    frontier_point,
    table,
)
from engine.attacks.suite import Suite, chosen_attacks
from engine.distributed.group import refuse_sharing
from engine.views import save_image
from tools.lib.attacking import (
    add_foreign,
    add_settings,
    checkpoint_config,
    make_plan,
    prepare_output,
)
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


@dataclass(frozen=True)
class Protection:
    """One kind of protection.

    Attributes:
        name: Name in charts.
        level: ``anonymized`` or ``desensitized``.
        checkpoint: Training with the networks and the data.
        overrides: Keys that differ from its configuration.
    """

    name: str
    level: str
    checkpoint: Path
    overrides: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of the point's folder in the output folder."""
        return self.name.replace(" ", "_")


def protections(
    checkpoints: Sequence[Path], strengths: Sequence[float], opts: Sequence[str]
) -> list[Protection]:
    """Return a protection for each checkpoint and each strength.

    Raises:
        UserError: A checkpoint or a strength is given twice, or cannot be used.
    """
    points = [
        Protection(_name(path, checkpoints), "anonymized", path, tuple(opts))
        for path in checkpoints
    ]
    for strength in strengths:
        cfg, _ = checkpoint_config(checkpoints[0], opts)
        overrides = (*opts, "INPUT.RADIUS", f"{strength:g}")
        name = f"{cfg.INPUT.TYPE} {strength:g}"
        points.append(Protection(name, "desensitized", checkpoints[0], overrides))
    names = [point.name for point in points]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name!r} is given twice; expected each checkpoint and strength once")
    for point in points:  # fail now, not hours later
        checkpoint_config(point.checkpoint, point.overrides)
    return points


def _name(path: Path, all_paths: Sequence[Path]) -> str:
    """Return the folder's name, with its parent's name if two folders have the same."""
    same = [other for other in all_paths if other.resolve().name == path.resolve().name]
    full = path.resolve()
    return full.name if len(same) == 1 else f"{full.parent.name}-{full.name}"


def measure(
    protection: Protection, args: argparse.Namespace
) -> tuple[FrontierPoint, dict[str, Any]]:
    """Run the attacks of one point, or read them from its folder.

    Returns:
        The point, and its folder, settings and versions.
    """
    cfg, start = checkpoint_config(protection.checkpoint, protection.overrides)
    set_threads(cfg.RUNTIME.THREADS)
    suite = Suite(args.output / protection.folder, make_plan(cfg, start, (protection.level,), args))
    loading.dump(cfg, suite.folder / "config.yml")
    foreign = foreign_attacks(args.foreign)
    names = [*attacks_of(protection.level), *(attack.name for attack in foreign)]
    results = suite.run(chosen_attacks(names, foreign))
    origin = {"folder": protection.folder, "settings": suite.record, "versions": suite.versions()}
    return frontier_point(protection.name, protection.level, results), origin


def frontier(args: argparse.Namespace) -> None:
    """Measure all points and draw them."""
    refuse_sharing("tools/frontier.py")
    with locked_folder(args.output), answer(as_json=args.json) as show:
        _frontier(args, show)


def _frontier(args: argparse.Namespace, show: Show) -> None:
    logger = setup_logger(args.output)
    wanted = protections(args.checkpoint, args.strength, args.opts)
    for protection in wanted:
        prepare_output(args.output / protection.folder)
    measured = [measure(protection, args) for protection in wanted]
    points = [point for point, _ in measured]
    save_image(frontier_chart(points), args.output / "frontier.png")
    content = [point.to_json() | origin for point, origin in measured]
    for name, text in (
        ("frontier.json", json.dumps(content, indent=2)),
        ("table.txt", table(points)),
    ):
        write_text(args.output / name, text + "\n")
    logger.info("\n%s", table(points))
    logger.info("The chart is %s", args.output / "frontier.png")
    show(content)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(
        description=__doc__,
        epilog=_EXAMPLES,
    )
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
    add_foreign(parser)
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
    return exit_code_of(lambda: frontier(args), "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
