"""Train and evaluate: python3 tools/main.py --config_file=FILE KEY VALUE ..."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from configs import loading
from engine.distributed.processes import from_main, joined, leave
from tools.lib.command_line import Parser, add_json, answer, exit_code_of
from tools.lib.run import run

_EXAMPLES = """examples:
  the baseline, on Market-1501 below /data (first: python3 data/train_split.py
  --dataset_root_dir /data --dataset_name market1501):
    python3 tools/main.py --config_file=configs/AGW_baseline.yml DATASETS.ROOT_DIR /data \\
      DATASETS.NAMES "('market1501_val')" INPUT.TYPE mosaic INPUT.RADIUS 24.0 \\
      OUTPUT_DIR ./log/base MODEL.MODE C
  the full method: leave out MODEL.MODE C and add MODEL.VAL_R1 0.75
  continue after an interruption: the same command and SOLVER.RESUME True
  test: the same command with DATASETS.NAMES market1501, another OUTPUT_DIR and
    TEST.EVALUATE_ONLY on MODEL.PRETRAIN_CHOICE self MODEL.PRETRAIN_DIR ./log/base

docs/configuration.md lists every key with its meaning and allowed values.
"""


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = Parser(
        description="Train and evaluate person re-identification on anonymized images.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--config_file", default="", metavar="FILE", help="YAML file of keys")
    add_json(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys that override the file"
    )
    args = parser.parse_args(argv)

    def work() -> None:
        with answer(as_json=args.json) as show, joined():
            report = run(from_main(lambda: loading.load(args.config_file, args.opts)))
            if report is not None:  # the main process
                show(report.to_json())

    return exit_code_of(
        work, "interrupted; to continue a training, repeat the command with SOLVER.RESUME True"
    )


if __name__ == "__main__":
    leave(main())
