"""Train and evaluate: python3 tools/main.py --config_file=FILE KEY VALUE ..."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from yacs.config import CfgNode

from configs import loading
from engine.build import build_evaluation, build_trainer
from engine.report import EvalReport
from utils.device import set_threads
from utils.errors import UserError
from utils.files import ensure_folder, remove_leftovers
from utils.logger import get_logger, setup_logger

_EXAMPLES = """examples:
  the baseline, on Market-1501 below /data (first: python3 data/train_split.py
  --dataset_root_dir /data --dataset_name market1501):
    python3 tools/main.py --config_file=configs/AGW_baseline.yml DATASETS.ROOT_DIR /data \\
      DATASETS.NAMES "('market1501_val')" INPUT.TYPE mosaic INPUT.RADIUS 24.0 \\
      OUTPUT_DIR ./log/base MODEL.MODE C
  the full method: leave out MODEL.MODE C and add MODEL.VAL_R1 0.75
  go on after an interruption: the same command and SOLVER.RESUME True
  test: the same command with DATASETS.NAMES market1501, another OUTPUT_DIR and
    TEST.EVALUATE_ONLY on MODEL.PRETRAIN_CHOICE self MODEL.PRETRAIN_DIR ./log/base

Every key, its meaning and its allowed values are in configs/defaults.py.
"""


def run(cfg: CfgNode) -> EvalReport:
    """Train, unless TEST.EVALUATE_ONLY is on, and evaluate; writes everything to OUTPUT_DIR.

    After a training the best weights (the latest where nothing was validated) are scored on the
    validation split, or, where there is none, on the test split.
    """
    output_dir = ensure_folder(cfg.OUTPUT_DIR)
    remove_leftovers(output_dir)
    logger = setup_logger(output_dir)
    set_threads(cfg.RUNTIME.THREADS)
    logger.info("Running with OUTPUT_DIR %s, SOLVER.SEED %d", output_dir, cfg.SOLVER.SEED)
    if cfg.TEST.EVALUATE_ONLY == "on":
        loading.dump(cfg, output_dir / "config.yml")
    else:
        cfg = _train(cfg)
    evaluator, epoch = build_evaluation(cfg)
    report = evaluator.evaluate(epoch)
    report.save(output_dir / "results.json")
    for line in report.log_lines():
        logger.info(line)
    logger.info("\n%s", report.table())
    logger.info("Results are in %s", output_dir / "results.json")
    return report


def _train(cfg: CfgNode) -> CfgNode:
    """Train; returns the configuration that evaluates what came out."""
    trainer = build_trainer(cfg)
    loading.dump(cfg, Path(cfg.OUTPUT_DIR) / "config.yml")
    trainer.fit()
    evaluation = cfg.clone()
    evaluation.defrost()
    evaluation.MODEL.PRETRAIN_CHOICE = "self"
    evaluation.MODEL.PRETRAIN_DIR = cfg.OUTPUT_DIR
    evaluation.EVAL.SPLIT = "test" if trainer.validation is None else "val"
    evaluation.freeze()
    return evaluation


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate person re-identification on anonymized images.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config_file", default="", metavar="FILE", help="YAML file of keys")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys that override the file"
    )
    args = parser.parse_args(argv)
    try:
        run(loading.load(args.config_file, args.opts))
    except (UserError, OSError) as error:
        get_logger().error("stopped: %s", error) if get_logger().handlers else None
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        print("interrupted; the same command with SOLVER.RESUME True goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
