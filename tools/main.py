"""Train and evaluate: python3 tools/main.py --config_file=FILE KEY VALUE ..."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from yacs.config import CfgNode

from configs import loading
from engine.attacks.measures import SETTINGS_NAME
from engine.build import build_trainer
from engine.checkpoint import training_in
from engine.details import (
    calibrations,
    detail_directions,
    details_table,
    save_calibrations,
    save_details,
)
from engine.distributed.group import Launch, joined, leave
from engine.distributed.processes import from_main, is_main
from engine.evaluation import Evaluation, Extraction, Scored, build_evaluation
from engine.results import EvalReport
from engine.scoring.paired import Access
from engine.views import save_picture
from tools.lib.command_line import Parser, exit_code_of
from utils.config_tree import changed
from utils.device import set_threads
from utils.errors import UserError
from utils.files import ensure_folder, remove_leftovers
from utils.logger import get_logger, setup_logger
from utils.memory import keep_freed_memory

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

Every key, its meaning and its allowed values are in docs/configuration.md.
"""


def run(cfg: CfgNode) -> EvalReport | None:
    """Train, unless TEST.EVALUATE_ONLY is on, and evaluate; writes everything to OUTPUT_DIR.

    After a training the best weights (the latest where nothing was validated) are scored on the
    validation split, or, where there is none, on the test split.

    Returns:
        The report; None in processes of a distributed run besides the first.
    """
    logger = _start(cfg)
    set_threads(cfg.RUNTIME.THREADS)
    output_dir = Path(cfg.OUTPUT_DIR)
    keep_freed_memory()
    logger.info("Running with OUTPUT_DIR %s, SOLVER.SEED %d", output_dir, cfg.SOLVER.SEED)
    cfg = _evaluation_alone(cfg) if cfg.TEST.EVALUATE_ONLY == "on" else _train(cfg)
    evaluation = build_evaluation(cfg)
    found = evaluation.evaluator.extract()
    if not is_main():
        return None
    scored = evaluation.evaluator.score(found)
    report = evaluation.evaluator.report(found, scored, evaluation.epoch)
    report.save(output_dir / "results.json")
    save_picture(evaluation.draw(), output_dir / "pictures.png")
    for line in report.log_lines():
        logger.info(line)
    logger.info("\n%s", report.table())
    _extras(cfg, evaluation, found, scored)
    Launch.done(output_dir)
    logger.info(
        "Results are in %s, pictures in pictures.png beside it", output_dir / "results.json"
    )
    return report


def _start(cfg: CfgNode) -> logging.Logger:
    """Prepare OUTPUT_DIR and the log; of several processes only the first writes."""
    if not is_main():
        return setup_logger(level=logging.WARNING)
    output_dir = ensure_folder(cfg.OUTPUT_DIR)
    attacks = output_dir / SETTINGS_NAME
    if attacks.is_file():
        raise UserError(
            f"{attacks} exists: OUTPUT_DIR '{output_dir}' holds attacks, whose config.yml and "
            "results.json would be replaced; choose another OUTPUT_DIR"
        )
    for folder in (output_dir, output_dir / "pictures"):
        remove_leftovers(folder)
    return setup_logger(output_dir)


def _extras(cfg: CfgNode, evaluation: Evaluation, found: Extraction, scored: Scored) -> None:
    """Write what is asked for beyond the table, and the thresholds that validation gives."""
    output_dir, cross_camera = Path(cfg.OUTPUT_DIR), cfg.TEST.CROSS_CAMERA
    if cfg.EVAL.SPLIT == "val":
        save_calibrations(calibrations(found, cross_camera=cross_camera), output_dir)
    if cfg.EVAL.DETAILS == "on":
        evaluator = evaluation.evaluator
        key = evaluator.template.headline_key
        access = Access() if key == "none" else Access(key, cfg.ISED.SCHEME)
        details = detail_directions(
            found, key, cross_camera=cross_camera, seed=cfg.SOLVER.SEED, reranked=scored.reranked
        )
        save_details(details, access, evaluator.query_samples, output_dir)
        get_logger().info("\n%s", details_table(details, access))


def _evaluation_alone(cfg: CfgNode) -> CfgNode:
    """Return the configuration of an evaluation, which is saved unless it would hide another."""
    output_dir = Path(cfg.OUTPUT_DIR)
    if cfg.SOLVER.RESUME:
        return _evaluating_output(cfg)  # config.yml there is that of the training
    if not is_main():
        return cfg
    training = training_in(output_dir)
    if training is not None:
        raise UserError(
            f"{training} exists: OUTPUT_DIR '{output_dir}' holds a training, whose config.yml and "
            "results.json an evaluation would replace; choose another OUTPUT_DIR, or "
            "SOLVER.RESUME True to evaluate that training in its place"
        )
    loading.dump(cfg, output_dir / "config.yml")
    return cfg


def _evaluating_output(cfg: CfgNode) -> CfgNode:
    """Return the configuration that evaluates the checkpoint in OUTPUT_DIR."""
    own = {"MODEL.PRETRAIN_CHOICE": "self", "MODEL.PRETRAIN_DIR": cfg.OUTPUT_DIR}
    return changed(cfg, own)


def _train(cfg: CfgNode) -> CfgNode:
    """Train; returns the configuration that evaluates what came out."""
    folder = Path(cfg.OUTPUT_DIR)
    launched = from_main(lambda: Launch.begin(folder))
    cfg = _resuming(cfg) if launched.resumes else cfg
    trainer = build_trainer(cfg)
    if is_main():
        if cfg.SOLVER.RESUME:
            _tell_changes(cfg, folder / "config.yml", trainer.state.epoch)
        loading.dump(cfg, folder / "config.yml")
        launched.accepted()
    trainer.fit()
    split = "test" if trainer.validation is None else "val"
    return changed(_evaluating_output(cfg), {"EVAL.SPLIT": split})


def _resuming(cfg: CfgNode) -> CfgNode:
    """Return the configuration of a run that torchrun has restarted."""
    get_logger().info("Restarted by torchrun: going on from the last checkpoint")
    return changed(cfg, {"SOLVER.RESUME": True})


def _tell_changes(cfg: CfgNode, path: Path, epoch: int) -> None:
    """Log what a resume changes of the configuration in OUTPUT_DIR, which is then written anew.

    The log is appended to, so that with ``config.yml``, the last values, it tells the values that
    each part of the training was made with. What must not change has been refused before.
    """
    try:
        before = loading.load(path)
    except UserError as error:  # lost, or written when there were other keys
        get_logger().warning("What changed at this resume is not known: %s", error)
        return
    own = {"OUTPUT_DIR", "SOLVER.RESUME"}  # the folder may have been moved
    told = [
        f"{name} {was!r} -> {now!r}"
        for name, (was, now) in loading.changes(before, cfg).items()
        if name not in own
    ]
    if told:
        get_logger().info("Values changed after epoch %d: %s", epoch, ", ".join(told))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(
        description="Train and evaluate person re-identification on anonymized images.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--config_file", default="", metavar="FILE", help="YAML file of keys")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys that override the file"
    )
    args = parser.parse_args(argv)

    def work() -> None:
        with joined():
            run(from_main(lambda: loading.load(args.config_file, args.opts)))

    return exit_code_of(
        work, "interrupted; a training goes on with the same command and SOLVER.RESUME True"
    )


if __name__ == "__main__":
    leave(main())
