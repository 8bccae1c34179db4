"""One run: train and evaluate a configuration, and write everything to OUTPUT_DIR.

An experiment is a training and its test.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from yacs.config import CfgNode

from configs import loading
from configs.loading import OF_A_RESULT, OF_A_TRAINING, differing
from configs.published import STRENGTHS, VAL_R1
from data.registry import DATASETS
from engine.attacks.measures import SETTINGS_NAME
from engine.build import build_trainer
from engine.checkpoint import NATIVE_NAMES, Launch, training_in
from engine.details import (
    calibrations,
    detail_directions,
    details_table,
    save_calibrations,
    save_details,
)
from engine.distributed.processes import all_gather, from_main, is_main, locked_by_main, world
from engine.evaluation import Evaluation, Extraction, Scored, build_evaluation
from engine.report import DIRECTIONS, RESULTS_NAME, EvalReport, Results
from engine.scoring.intervals import PER_QUERY_NAME, Access
from engine.train_step import BatchTooLarge
from engine.trainer import NonFiniteError, Trainer
from engine.views import save_image
from modeling.privacy_networks import PrivacyNetworks
from tools.lib.run_files import is_of_real_people
from utils.config_tree import changed
from utils.device import set_threads
from utils.errors import UserError
from utils.files import locked_folder, remove_leftovers
from utils.logger import get_logger, setup_logger
from utils.memory import keep_freed_memory


class TrainingStopped(UserError):  # noqa: N818 - also memory that runs out
    """A training cannot continue with these values."""

    exit_code = 1


def run(cfg: CfgNode) -> EvalReport | None:
    """Train, unless TEST.EVALUATE_ONLY is on, and evaluate; write everything to OUTPUT_DIR.

    After a training the best weights (the latest without validations) are scored on the validation
    split, or, without one, on the test split.

    Returns:
        The report; None in all but the first process of a distributed run.
    """
    with locked_by_main(cfg.OUTPUT_DIR):
        return _run(cfg)


def _run(cfg: CfgNode) -> EvalReport | None:
    logger = _start(cfg)
    set_threads(cfg.RUNTIME.THREADS)
    output_dir = Path(cfg.OUTPUT_DIR)
    keep_freed_memory()
    logger.info("Running with OUTPUT_DIR %s, SOLVER.SEED %d", output_dir, cfg.SOLVER.SEED)
    if cfg.EVAL.IMAGES == "on" and is_of_real_people(cfg.DATASETS.NAMES):
        logger.warning(
            "OUTPUT_DIR will contain images of the data set: pictures.png, pictures/, strips.png, "
            "ranks_*.png and TensorBoard. Do not share it unless these people agree: set "
            "EVAL.IMAGES off, or copy the weights without images with `python3 tools/export.py "
            "--pack`"
        )
    cfg = _evaluation_alone(cfg) if cfg.TEST.EVALUATE_ONLY == "on" else _train(cfg)
    evaluation = build_evaluation(cfg)
    extraction = evaluation.evaluator.extract()
    if not is_main():
        return None
    scored = evaluation.evaluator.score(extraction)
    report = evaluation.evaluator.report(extraction, scored, evaluation.epoch)
    report.save(output_dir / RESULTS_NAME)
    if evaluation.draw is not None:
        save_image(evaluation.draw(), output_dir / "pictures.png")
    for line in report.log_lines():
        logger.info(line)
    logger.info("\n%s", report.table())
    _write_details(cfg, evaluation, extraction, scored)
    if cfg.EVAL.REPORT == "on":
        _write_report(cfg, evaluation, extraction)
    Launch.finished(output_dir)
    logger.info("Results are in %s", output_dir / RESULTS_NAME)
    return report


def _start(cfg: CfgNode) -> logging.Logger:
    """Prepare OUTPUT_DIR and the log; in a distributed run only the first process writes."""
    if not is_main():
        return setup_logger(level=logging.WARNING)
    output_dir = Path(cfg.OUTPUT_DIR)
    attacks = output_dir / SETTINGS_NAME
    if attacks.is_file():
        raise UserError(
            f"{attacks} exists: OUTPUT_DIR '{output_dir}' contains attacks, whose config.yml and "
            "results.json would be replaced; choose another OUTPUT_DIR"
        )
    for folder in (output_dir, output_dir / "pictures"):
        remove_leftovers(folder)
    return setup_logger(output_dir)


def _write_details(
    cfg: CfgNode, evaluation: Evaluation, extraction: Extraction, scored: Scored
) -> None:
    """Write the details that EVAL.DETAILS asks for, and the thresholds of a validation split."""
    output_dir, cross_camera = Path(cfg.OUTPUT_DIR), cfg.TEST.CROSS_CAMERA
    if cfg.EVAL.SPLIT == "val":
        save_calibrations(calibrations(extraction, cross_camera=cross_camera), output_dir)
    if cfg.EVAL.DETAILS == "on":
        evaluator = evaluation.evaluator
        key = evaluator.template.headline_key
        access = Access() if key == "none" else Access(key, cfg.ISED.SCHEME)
        details = detail_directions(
            extraction, key, cross_camera=cross_camera, reranked=scored.reranked
        )
        save_details(details, access, evaluator.query_samples, output_dir)
        get_logger().info("\n%s", details_table(details, access))


def _write_report(cfg: CfgNode, evaluation: Evaluation, extraction: Extraction) -> None:
    """Write ranked lists, image stages and report.html."""
    from tools.lib.drawing import Drawing  # these load matplotlib
    from tools.lib.report import report_of_run

    folder = Path(cfg.OUTPUT_DIR)
    # In a distributed run this process has only its share of the images.
    if cfg.EVAL.IMAGES == "on" and world().size == 1:
        evaluator = evaluation.evaluator
        drawing = Drawing(cfg, folder, evaluator, extraction)
        drawing.ranks(DIRECTIONS, evaluator.template.headline_key)
        if isinstance(evaluator.networks, PrivacyNetworks):
            drawing.strips(drawing.chosen([], 6))
    report_of_run(folder)


def _evaluation_alone(cfg: CfgNode) -> CfgNode:
    """Return the configuration of an evaluation; write it unless it would replace a training's."""
    output_dir = Path(cfg.OUTPUT_DIR)
    if cfg.SOLVER.RESUME:
        return _evaluating_output(cfg)  # config.yml in OUTPUT_DIR is that of the training
    if not is_main():
        return cfg
    training = training_in(output_dir)
    if training is not None:
        raise UserError(
            f"{training} exists: OUTPUT_DIR '{output_dir}' contains a training, whose config.yml "
            "and results.json an evaluation would replace; choose another OUTPUT_DIR, or "
            "SOLVER.RESUME True to evaluate that training and replace its results.json"
        )
    loading.dump(cfg, output_dir / "config.yml")
    return cfg


def _evaluating_output(cfg: CfgNode) -> CfgNode:
    """Return the configuration that evaluates the checkpoint in OUTPUT_DIR."""
    weights = {"MODEL.PRETRAIN_CHOICE": "self", "MODEL.PRETRAIN_DIR": cfg.OUTPUT_DIR}
    return changed(cfg, weights)


def _train(cfg: CfgNode) -> CfgNode:
    """Train; return the configuration that evaluates the result."""
    folder = Path(cfg.OUTPUT_DIR)
    # With several machines, only the one whose process failed counts the restart.
    restarts = max(all_gather(world().restarts))
    launch = from_main(lambda: Launch.begin(folder, restarts))
    if launch.resumes:
        get_logger().info("Restarted by torchrun: resuming from the last checkpoint")
        cfg = changed(cfg, {"SOLVER.RESUME": True})
    trainer = build_trainer(cfg)
    if is_main():
        if cfg.SOLVER.RESUME:
            _log_changes(cfg, folder / "config.yml", trainer.state.epoch)
        loading.dump(cfg, folder / "config.yml")
        launch.accepted()
    _fit(trainer)
    split = "test" if trainer.validation is None else "val"
    return changed(_evaluating_output(cfg), {"EVAL.SPLIT": split})


def _fit(trainer: Trainer) -> None:
    """Run the training; add to its errors which keys to change."""
    try:
        trainer.fit()
    except NonFiniteError as error:
        raise TrainingStopped(
            f"{error}: lower SOLVER.BASE_LR or set RUNTIME.PRECISION float32, then continue with "
            "SOLVER.RESUME True"
        ) from error
    except BatchTooLarge as error:
        if error.fits is None:
            advice = "halve SOLVER.IMS_PER_BATCH (only a single process tries how much fits)"
        elif error.fits:
            advice = f"set SOLVER.IMS_PER_BATCH {error.fits} instead of {error.size}"
        else:
            advice = "make INPUT.IMG_SIZE or MODEL.NGF smaller"
        raise TrainingStopped(
            f"{error}: {advice}, set SOLVER.GRAD_CHECKPOINT True, or keep the data set's images "
            "out of it (CACHE.MODE memory: not on the GPU, CACHE.MODE stream: not in memory); then "
            "continue with SOLVER.RESUME True"
        ) from error


def _log_changes(cfg: CfgNode, path: Path, epoch: int) -> None:
    """Log which values a resume changes in the config.yml that it is about to replace.

    The log is appended to. So log and config.yml together show the values of each part of the
    training. Changes that are not allowed have been refused before.
    """
    try:
        before = loading.load(path)
    except UserError as error:  # missing, or written by a version with other keys
        get_logger().warning("What changed at this resume is not known: %s", error)
        return
    expected = {"OUTPUT_DIR", "SOLVER.RESUME"}  # the folder may have been moved
    changes = [
        f"{name} {old!r} -> {new!r}"
        for name, (old, new) in loading.changes(before, cfg).items()
        if name not in expected
    ]
    if changes:
        get_logger().info("Values changed after epoch %d: %s", epoch, ", ".join(changes))


# The keys that distinguish the three methods of the published tables. They take precedence over
# overrides: MODEL.VAL_R1 on a command line applies to the full method only.
METHODS: Mapping[str, tuple[str, ...]] = {
    "base": ("MODEL.MODE", "C", "MODEL.VAL_R1", "inf"),
    "without": ("MODEL.MODE", "GCR", "MODEL.VAL_R1", "inf"),
    "full": ("MODEL.MODE", "GCR"),
}
PUBLISHED_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "AGW_baseline.yml"
# Keys that cannot be overridden, and what sets them.
_FIXED = {
    "MODEL.MODE": f"the method ({', '.join(METHODS)})",
    "OUTPUT_DIR": "--output",
    "EVAL.DETAILS": "the test, which needs it on",
    "TEST.EVALUATE_ONLY": "the test",
}
_TEST_FILES = (RESULTS_NAME, PER_QUERY_NAME)
# Not RUNTIME.PRECISION: results of both precisions are compared with published rates.
_OF_A_METHOD = tuple(name for name in OF_A_RESULT if name != "RUNTIME.PRECISION")


@dataclass(frozen=True)
class Experiment:
    """A training and its test; nothing is chosen by the test split."""

    config: Path  # YAML file of both
    method: str  # key of ``METHODS``
    folder: Path  # OUTPUT_DIR of the training; the test's folder is next to it
    overrides: tuple[str, ...] = ()  # ``KEY VALUE ...`` of both
    test_dataset: str = ""  # DATASETS.NAMES of the test; '' if it is the same as in training

    def __post_init__(self) -> None:
        """Raise if an override would change the method."""
        fixed = [key for key in self.overrides[::2] if key in _FIXED]
        if fixed:
            raise UserError(f"{fixed[0]} is set by {_FIXED[fixed[0]]}; leave the key out")

    @property
    def test_folder(self) -> Path:
        """OUTPUT_DIR of the test."""
        return self.folder.with_name(f"{self.folder.name}-test")

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return (self.folder / NATIVE_NAMES["latest"]).exists()

    @cached_property
    def training(self) -> CfgNode:
        """Configuration of the training."""
        resume = ("OUTPUT_DIR", str(self.folder), "SOLVER.RESUME", str(self.has_begun))
        return loading.load(self.config, [*self.overrides, *METHODS[self.method], *resume])

    @cached_property
    def test(self) -> CfgNode:
        """Configuration of the test."""
        values = ["TEST.EVALUATE_ONLY", "on", "SOLVER.RESUME", "False", "EVAL.DETAILS", "on"]
        values += ["MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(self.folder)]
        values += ["OUTPUT_DIR", str(self.test_folder)]
        if self.test_dataset:
            values += ["DATASETS.NAMES", self.test_dataset]
        return loading.load(self.config, [*self.overrides, *METHODS[self.method], *values])

    @property
    def is_finished(self) -> bool:
        """Whether the test has finished with these values."""
        complete = all((self.test_folder / name).is_file() for name in _TEST_FILES)
        return complete and not _changed_in(self.test_folder, self.test, OF_A_RESULT)

    def results(self) -> Results:
        """Return the results of a finished test.

        Raises:
            UserError: They are damaged.
        """
        return Results.load(self.test_folder)

    def run(self) -> Results:
        """Train and test; skip what is finished and resume what was interrupted.

        Raises:
            UserError: As for ``check_folder``, another process runs it, or the training failed.
        """
        self.check_folder()
        if not self.is_finished:
            # Results of an earlier test, which a run that is killed now would seem to have written.
            # With the lock, they are not those that another process writes now.
            with locked_folder(self.test_folder):
                for name in _TEST_FILES:
                    (self.test_folder / name).unlink(missing_ok=True)
            run(self.training)
            run(self.test)
        return self.results()

    def check_folder(self) -> None:
        """Raise if the folder contains a training with other values."""
        other = _changed_in(self.folder, self.training, OF_A_TRAINING)
        if other:
            raise UserError(
                f"{self.folder} contains a training with {', '.join(other)}; choose another "
                f"--output, or delete {self.folder} to train again"
            )

    def differences_from(self, other: Experiment) -> list[str]:
        """Return in words the values that differ from another experiment and change numbers."""
        return differing(other.test, self.test, _OF_A_METHOD)


def cell_values(
    dataset: str, desensitizer: str, radius: float, method: str, val_r1: float | str, seed: int
) -> tuple[str, ...]:
    """Return the ``KEY VALUE ...`` of a training for a cell of a table.

    ``dataset`` is that of the test; the training uses its validation split if a command makes one.
    """
    split = f"{dataset}_val"
    return (
        *("INPUT.TYPE", desensitizer, "INPUT.RADIUS", str(radius), "SOLVER.SEED", str(seed)),
        *(("MODEL.VAL_R1", str(val_r1)) if method == "full" else ()),
        *("DATASETS.NAMES", split if split in DATASETS else dataset),
    )


def is_as_published(folder: Path, dataset: str, desensitizer: str, method: str) -> bool:
    """Return whether a test, and its training if it still exists, have the published values.

    Seed, precision, devices and folders may differ. A ``config.yml`` of a version with other keys
    does not have them.
    """
    with contextlib.suppress(UserError):
        test = loading.load(folder / "config.yml")
        training = Path(test.MODEL.PRETRAIN_DIR)
        radius = STRENGTHS.get(desensitizer, math.nan)
        values = cell_values(dataset, desensitizer, radius, method, VAL_R1, test.SOLVER.SEED)
        published = Experiment(PUBLISHED_CONFIG, method, training, values, dataset)
        free = ("SOLVER.SEED", "RUNTIME.PRECISION", "EVAL.DETAILS", "MODEL.PRETRAIN_DIR")
        of_test = [name for name in OF_A_RESULT if name not in free]
        of_training = [name for name in OF_A_TRAINING if name not in free[:2]]
        return not differing(published.test, test, of_test) and not _changed_in(
            training, published.training, of_training
        )
    return False


def _changed_in(folder: Path, cfg: CfgNode, names: Sequence[str]) -> list[str]:
    """Return the values that differ from the ``config.yml`` in a folder; none if it is missing."""
    path = folder / "config.yml"
    return differing(loading.load(path), cfg, names) if path.is_file() else []
