"""Attack what a checkpoint protects, at every level, and say what each protection is worth."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from yacs.config import CfgNode

from configs import loading
from configs.comparability import moving_values
from engine.attacks.attack import Attack
from engine.attacks.build import Plan, plan_attacks
from engine.attacks.levels import LEVELS
from engine.attacks.measures import SETTINGS_NAME
from engine.attacks.suite import (
    ATTACKS,
    Suite,
    Verdicts,
    chosen_attacks,
    chosen_levels,
    read_expectation,
    report,
    unexpected_verdicts,
    verdicts_of,
)
from engine.distributed.group import joined, leave
from engine.distributed.processes import (
    barrier,
    first_on_machine,
    from_main,
    is_main,
    locked_by_main,
    share,
)
from tools.lib.command_line import Parser, exit_code_of, whole_number
from utils.device import set_threads
from utils.errors import UserError
from utils.files import ensure_folder, remove_leftovers
from utils.logger import setup_logger

_EXAMPLES = """examples:
  python3 tools/attack.py --checkpoint demo/full --output attacks
  python3 tools/attack.py --checkpoint demo/full --output attacks --only linkage --only brute-force
  python3 tools/attack.py --checkpoint demo/full --output small --budget 256 --epochs 4 --people 16
  python3 tools/attack.py --checkpoint log/run --output attacks DATASETS.ROOT_DIR /data
  torchrun --standalone --nproc_per_node 4 tools/attack.py --checkpoint log/run --output attacks

The data set, image size and networks are those of the checkpoint's config.yml; keys at the end
override them. The output folder gets a JSON file and pictures for each attack, results.json,
verdicts.json, table.txt, and the configuration as config.yml. The same command goes on after an
interruption: finished attacks are kept.

Exit code: 0 whatever the verdicts, 1 if --expect finds a difference or a disk fails, 2 wrong input,
130 interrupted.
What the attacks are and how to read them: docs/ATTACKS.md.
"""


def checkpoint_config(checkpoint: Path, overrides: Sequence[str]) -> tuple[CfgNode, str]:
    """Return the configuration that loads a training's weights, and what attackers start from.

    That is ImageNet weights if the training started from them (MODEL.PRETRAIN_CHOICE, which may be
    overridden), and random ones otherwise: an attacker does not have the owner's weights.

    Raises:
        UserError: The folder has no training.
    """
    path = checkpoint / "config.yml"
    if not checkpoint.is_dir() or not path.is_file():
        what = "does not exist" if not checkpoint.exists() else "has no config.yml"
        raise UserError(
            f"checkpoint {checkpoint} {what}; expected the OUTPUT_DIR of a training, such as "
            "demo/full"
        )
    trained = loading.load(path, [*overrides, "MODEL.PRETRAIN_DIR", ""])
    start = "imagenet" if trained.MODEL.PRETRAIN_CHOICE == "imagenet" else "none"
    place = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(checkpoint))
    return loading.load(path, [*overrides, *place]), start


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what the numbers of an attack depend on."""
    parser.add_argument(
        "--budget", type=whole_number(16, 10**6), metavar="N",
        help="public images that an attacker trains on (default: all, at most 4096)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=whole_number(1, 10**4), default=40, metavar="N",
        help="passes over them; smaller budgets of a curve get as many updates (default: 40)",
    )  # fmt: skip
    parser.add_argument(
        "--people", type=whole_number(6, 10**5), default=100, metavar="N",
        help="most private persons to score on (default: 100)",
    )  # fmt: skip
    parser.add_argument(
        "--keys", type=whole_number(1, 10**7), default=10_000, metavar="N",
        help="keys that the brute force tries on each image (default: 10000)",
    )  # fmt: skip
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31 - 1),
        default=1,
        help="of everything drawn (default: 1)",
    )


def make_plan(cfg: CfgNode, start: str, levels: tuple[str, ...], args: argparse.Namespace) -> Plan:
    """Plan attacks on a configuration, all that can move their numbers recorded.

    Args:
        cfg: What ``checkpoint_config`` gave.
        start: Likewise.
        levels: Levels to attack.
        args: The options of ``add_settings``.

    Raises:
        UserError: As for ``plan_attacks``.
    """
    plan = plan_attacks(
        cfg, seed=args.seed, budget=args.budget, epochs=args.epochs, people=args.people,
        levels=levels, keys=args.keys, start=start,
    )  # fmt: skip
    values = moving_values(cfg)
    del values["MODEL.PRETRAIN_DIR"]  # a place: what lies there is recorded by its weights
    return replace(plan, record=values | plan.record)


def prepared(output: Path) -> Path:
    """Return a folder for attacks, which exists.

    Raises:
        UserError: It is that of a training or an evaluation, whose files would be replaced.
    """
    config = output / "config.yml"
    if config.is_file() and not (output / SETTINGS_NAME).is_file():
        raise UserError(
            f"{config} exists, but no {SETTINGS_NAME} of attacks: a training or an evaluation lies "
            "there, whose files would be replaced; choose another --output"
        )
    folder = ensure_folder(output)
    remove_leftovers(folder)
    return folder


def attack(args: argparse.Namespace) -> list[str]:
    """Run the attacks that were asked for; returns how they differ from the expectation."""
    attacks = chosen_attacks(args.only)
    levels = chosen_levels(args.level, LEVELS)
    expected = None if args.expect is None else read_expectation(args.expect)
    with joined():
        cfg, start = checkpoint_config(args.checkpoint, args.opts)
        with locked_by_main(args.output):
            found = _run(args, cfg, start, attacks, levels)
    return [] if expected is None or found is None else unexpected_verdicts(found, expected)


def _run(
    args: argparse.Namespace,
    cfg: CfgNode,
    start: str,
    attacks: Sequence[Attack],
    levels: tuple[str, ...],
) -> Verdicts | None:
    """Run attacks, of several processes each every N-th; None in those besides the first."""
    output = from_main(lambda: prepared(args.output))
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
    logger.info("Results, pictures and verdicts are in %s", output)
    return verdicts_of(results)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(
        description="Attack every level of protection and report what each attack reaches.",
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
    parser.add_argument(
        "--expect", type=Path, metavar="FILE",
        help="verdicts.json of an earlier run: exit with 1 if a verdict differs",
    )  # fmt: skip
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys that override config.yml"
    )
    args = parser.parse_intermixed_args(argv)

    def work() -> int:
        differing = attack(args)
        for line in differing:
            print(f"unexpected: {line}", file=sys.stderr)
        return int(bool(differing))

    return exit_code_of(work, "interrupted; the same command goes on")


if __name__ == "__main__":
    leave(main())
