"""Attack stored images at every level of protection, and report which levels hold."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from yacs.config import CfgNode

from configs import loading
from engine.attacks.attack import Attack
from engine.attacks.foreign import foreign_attacks
from engine.attacks.levels import LEVELS
from engine.attacks.measures import Result
from engine.attacks.suite import (
    ATTACKS,
    Suite,
    chosen_attacks,
    chosen_names,
    read_expectation,
    report,
    unexpected_verdicts,
    verdicts_of,
)
from engine.distributed.processes import (
    barrier,
    first_on_machine,
    from_main,
    is_main,
    joined,
    leave,
    locked_by_main,
    share,
)
from tools.lib.attacking import add_settings, checkpoint_config, make_plan, prepare_output
from tools.lib.command_line import Parser, add_json, answer, exit_code_of
from utils.device import set_threads
from utils.logger import setup_logger

_EXAMPLES = """examples:
  python3 tools/attack.py --checkpoint demo/full --output attacks
  python3 tools/attack.py --checkpoint demo/full --output attacks --only linkage --only brute-force
  python3 tools/attack.py --checkpoint demo/full --output small --budget 256 --epochs 4 --people 16
  python3 tools/attack.py --checkpoint log/run --output attacks DATASETS.ROOT_DIR /data
  python3 tools/attack.py --checkpoint demo/full --output attacks --foreign network.json
  torchrun --standalone --nproc_per_node 4 tools/attack.py --checkpoint log/run --output attacks

The checkpoint's config.yml gives data set, image size and networks; keys at the end override it.
The output folder contains a JSON file and images for each attack, results.json, verdicts.json,
table.txt, config.yml and report.html. The same command continues an interrupted run.

Exit code: 0 for any verdicts, 1 if --expect finds a difference or a disk fails, 2 wrong input,
130 interrupted. Attacks and how to read their results: docs/ATTACKS.md.
"""


# A process whose attacks are finished waits for the others, whose trainings may take days.
_LONGEST_WAIT = timedelta(days=365)


def attack(args: argparse.Namespace) -> int:
    """Run attacks, print their results, and return the exit code."""
    foreign = foreign_attacks(args.foreign)
    attacks = chosen_attacks(args.only, foreign)
    levels = chosen_names(args.level, LEVELS, "level")
    expected = None if args.expect is None else read_expectation(args.expect)
    with answer(as_json=args.json) as show, joined(_LONGEST_WAIT):
        cfg, start = checkpoint_config(args.checkpoint, args.opts)
        with locked_by_main(args.output):
            results = _run(args, cfg, start, attacks, levels)
        if results is None:
            return 0
        verdicts = verdicts_of(results)
        unexpected = [] if expected is None else unexpected_verdicts(verdicts, expected)
        show({"results": [result.to_json() for result in results], "unexpected": unexpected})
    for line in unexpected:
        print(f"unexpected: {line}", file=sys.stderr)
    return int(bool(unexpected))


def _run(
    args: argparse.Namespace,
    cfg: CfgNode,
    start: str,
    attacks: Sequence[Attack],
    levels: Sequence[str],
) -> list[Result] | None:
    """Run attacks, divided among the processes of the run; return None in all but the first."""
    output = from_main(lambda: prepare_output(args.output))
    level = logging.INFO if is_main() else logging.WARNING
    logger = setup_logger(output if is_main() else None, level)
    set_threads(cfg.RUNTIME.THREADS)
    plan = make_plan(cfg, start, levels, args)
    suite = first_on_machine(lambda: Suite(output, plan))
    if is_main():
        loading.dump(cfg, output / "config.yml")
    suite.work(share(attacks))
    barrier()
    if not is_main():
        return None
    results = suite.finish(attacks)
    logger.info("\n%s", report(results))
    if cfg.EVAL.REPORT == "on":
        from tools.lib.report import report_of_run  # loads jinja2

        report_of_run(output)
    logger.info("Results, images and verdicts are in %s", output)
    return results


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(
        description=__doc__,
        epilog=f"{_EXAMPLES}\nattacks: {', '.join(ATTACKS)}\nlevels: {', '.join(LEVELS)}\n",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR",
        help="OUTPUT_DIR of a training with MODEL.MODE GCR",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("attacks"), metavar="DIR",
        help="folder for results (default: attacks)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="run this attack; may be given several times (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--level", action="append", default=[], metavar="NAME",
        help="attack this level; may be given several times (default: all)",
    )  # fmt: skip
    add_settings(parser)
    add_json(parser)
    parser.add_argument(
        "--expect", type=Path, metavar="FILE",
        help="verdicts.json of an earlier run: exit with 1 if a verdict differs",
    )  # fmt: skip
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys that override config.yml"
    )
    args = parser.parse_intermixed_args(argv)
    return exit_code_of(lambda: attack(args), "interrupted; the same command continues")


if __name__ == "__main__":
    leave(main())
