"""Train rows of the published tables over several seeds; compare means with published numbers."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from configs import loading
from configs.published import STRENGTHS, VAL_R1
from data.datasets.layout import LoadRequest
from data.registry import find_loader, load_data
from data.train_split import NAMES, make_split
from engine.distributed.processes import refuse_sharing
from tools.lib.command_line import (
    MAX_SEED,
    Parser,
    Show,
    add_json,
    answer,
    exit_code_of,
    shown,
    whole_number,
)
from tools.lib.run import METHODS, PUBLISHED_CONFIG, Experiment, cell_values
from tools.lib.tables import Row, Summary, markdown, summaries
from utils.errors import UserError
from utils.files import write_text
from utils.logger import get_logger

_Value = TypeVar("_Value")
_EXAMPLES = """examples:
  one cell of the published table, three seeds (Market-1501 below D):
    python3 tools/reproduce.py --datasets market1501 --desensitizers mosaic --methods full \\
      --seeds 1,2,3 DATASETS.ROOT_DIR D
  the whole published table:
    python3 tools/reproduce.py --datasets market1501,msmt17,cuhk03 \\
      --desensitizers blur,mosaic,noise \\
      DATASETS.ROOT_DIR D
  the spread of the demo's numbers:
    python3 tools/reproduce.py --config_file configs/demo.yml --datasets synthetic \\
      --seeds 1,2,3,4,5 --output log/demo-seeds
  --plan lists the trainings and runs none.

The same command again keeps finished trainings and resumes an interrupted one. For
several GPUs start one command each, with different seeds (MODEL.DEVICE_ID 0 --seeds 1) and the same
--output, and then the command with all seeds. The table is in OUTPUT/reproduction.md and .json and
is updated after every training, with the seeds of that command.

Exit code: 0 done, 1 a mean is farther from the published number than the tolerance, or a disk or
device failed, 2 wrong input, 130 interrupted.
"""


def _desensitizer(text: str) -> tuple[str, float]:
    """Return INPUT.TYPE and INPUT.RADIUS of ``mosaic`` (published strength) or ``mosaic:12``."""
    kind, colon, radius = text.partition(":")
    try:
        return kind, float(radius) if colon else STRENGTHS[kind]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected {', '.join(STRENGTHS)}, or TYPE:RADIUS, with commas"
        ) from None


def _several(read: Callable[[str], _Value]) -> Callable[[str], list[_Value]]:
    """Return a function that reads comma-separated values (spaces separate KEY VALUE pairs)."""

    def read_all(text: str) -> list[_Value]:
        return list(dict.fromkeys(read(part) for part in text.split(",")))

    return read_all


def _datasets(text: str) -> list[str]:
    return [text] if ":" in text else _several(str)(text)  # a path may contain commas


def _method(text: str) -> str:
    if text not in METHODS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(METHODS)}")
    return text


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Return the rows of the table, each with one experiment per seed.

    Raises:
        UserError: The configuration is wrong.
    """
    if "SOLVER.SEED" in args.opts[::2]:
        raise UserError("SOLVER.SEED is set by --seeds; leave the key out")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file; give a folder")
    cfg = loading.load(args.config_file, args.opts)
    # As on the published command lines; the configuration files contain no MODEL.VAL_R1.
    val_r1 = VAL_R1 if math.inf == cfg.MODEL.VAL_R1 else cfg.MODEL.VAL_R1
    return [
        _row(args, dataset, kind, radius, method, val_r1)
        for dataset in args.datasets or [cfg.DATASETS.NAMES]
        for kind, radius in args.desensitizers or [(cfg.INPUT.TYPE, cfg.INPUT.RADIUS)]
        for method in args.methods
    ]


def _row(
    args: argparse.Namespace,
    dataset: str,
    kind: str,
    radius: float,
    method: str,
    val_r1: float | str,
) -> Row:
    folder = args.output / re.sub(r"[^\w-]+", "-", dataset)

    def experiment(
        config: Path, opts: Sequence[str], seed: int, strength: float, enough: float | str
    ) -> Experiment:
        name = f"{kind}-{radius:g}-{method}-seed{seed}"
        values = cell_values(dataset, kind, strength, method, enough, seed)
        return Experiment(config, method, folder / name, (*opts, *values), dataset)

    experiments = {
        seed: experiment(args.config_file, args.opts, seed, radius, val_r1) for seed in args.seeds
    }
    seed, first = next(iter(experiments.items()))
    published = experiment(PUBLISHED_CONFIG, (), seed, STRENGTHS.get(kind, radius), VAL_R1)
    return Row(dataset, kind, radius, method, experiments, tuple(first.differences_from(published)))


def plan(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return state and folder of each experiment: finished, to resume or to do.

    Raises:
        UserError: The data set does not exist, or a folder contains a training with other values.
    """
    experiments = []
    for row in rows:
        find_loader(row.dataset)
        for experiment in row.experiments.values():
            unfinished = "to resume" if experiment.has_begun else "to do"
            experiment.check_folder()
            state = "finished" if experiment.is_finished else unfinished
            experiments.append({"state": state, "folder": str(experiment.folder)})
    return experiments


def work_through(rows: Sequence[Row], output: Path) -> list[Summary]:
    """Run unfinished experiments, one seed of every row before the next; return the table."""
    table = summaries(rows)  # before the trainings, so that damaged results are reported first
    left = [
        (row, seed)
        for seed in rows[0].experiments
        for row in rows
        if not row.experiments[seed].is_finished
    ]
    _prepare([row.experiments[seed] for row, seed in left])
    start = time.monotonic()
    for done, (row, seed) in enumerate(left):
        if done:
            hours = (time.monotonic() - start) / 3600
            get_logger().info(
                "%d of %d trainings done in %.1f h; about %.1f h left",
                done, len(left), hours, hours / done * (len(left) - done),
            )  # fmt: skip
        row.experiments[seed].run()
        table = _saved(summaries(rows), output)
    return table if left else _saved(table, output)


def _saved(table: list[Summary], output: Path) -> list[Summary]:
    content = [summary.to_json() for summary in table]
    write_text(output / "reproduction.json", json.dumps(content, indent=2) + "\n")
    write_text(output / "reproduction.md", markdown(table))
    return table


def _prepare(experiments: Sequence[Experiment]) -> None:
    """Check that all data sets exist before training, and create missing validation splits."""
    for dataset, experiment in {e.test_dataset: e for e in experiments}.items():
        cfg = experiment.training
        request = LoadRequest(
            dataset, Path(cfg.DATASETS.ROOT_DIR), cfg.MSMT17.PROTOCOL, cfg.CUHK03.KIND,
            list_only=True,
        )  # fmt: skip
        if dataset != "synthetic":  # it is created if it is missing
            load_data(request)
        split = request.root / f"{dataset}_val"
        if dataset not in NAMES:
            continue
        try:
            if not split.exists():
                make_split(
                    request.root, dataset, msmt17_protocol=request.msmt17_protocol,
                    cuhk03_kind=request.cuhk03_kind,
                )  # fmt: skip
        except UserError:
            if not split.exists():  # otherwise another command that shares the work created it
                raise
        load_data(replace(request, name=f"{dataset}_val"))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    args = _parser().parse_intermixed_args(argv)  # keys may be on both sides of an option

    def work() -> int:
        with answer(as_json=args.json) as show:
            return _reproduce(args, show)

    return exit_code_of(work, "interrupted; the same command resumes")


def _reproduce(args: argparse.Namespace, show: Show) -> int:
    """Print the plan, or train and print the table; return the exit code."""
    refuse_sharing("tools/reproduce.py")
    rows = rows_of(args)
    if args.plan:
        experiments = plan(rows)
        lines = (f"{each['state']:<9} {shown(each['folder'])}" for each in experiments)
        show(experiments, "\n".join(lines))
        return 0
    table = work_through(rows, args.output)
    path = shown(str(args.output / "reproduction.md"))
    show([summary.to_json() for summary in table], f"\n{markdown(table)}\nin {path}")
    return 0 if all(summary.agrees for summary in table) else 1


def _parser() -> Parser:
    parser = Parser(description=__doc__, epilog=_EXAMPLES)
    add = parser.add_argument
    add(
        "--config_file",
        type=Path,
        default=PUBLISHED_CONFIG,
        metavar="FILE",
        help="(AGW_baseline.yml)",
    )
    add(
        "--datasets", type=_datasets, metavar="NAME[,NAME]",
        help="values of DATASETS.NAMES without _val; default: the one configured",
    )  # fmt: skip
    add(
        "--desensitizers", type=_several(_desensitizer), metavar="TYPE[:RADIUS][,TYPE]",
        help="blur, mosaic, noise, at the published strength; default: the one configured",
    )  # fmt: skip
    add("--methods", type=_several(_method), default=list(METHODS), metavar="METHOD[,METHOD]",
        help="of base, without, full (all three)")  # fmt: skip
    add("--seeds", type=_several(whole_number(0, MAX_SEED)), default=[1], metavar="N[,N]",
        help="(1)")  # fmt: skip
    add("--output", type=Path, default=Path("log/reproduce"), help="folder (log/reproduce)")
    add("--plan", action="store_true", help="list the trainings and their state; run none")
    add_json(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="keys that override the file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
