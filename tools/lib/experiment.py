"""An experiment: a method trained on a data set and evaluated on its test split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from yacs.config import CfgNode

from configs import loading
from configs.comparability import OF_A_RESULT, OF_A_TRAINING, differing
from engine.checkpoint import NATIVE_NAMES
from engine.report import RESULTS_NAME, Results
from engine.scoring.intervals import PER_QUERY_NAME
from tools.lib.run import run
from utils.errors import UserError

# The keys that distinguish the three methods of the published tables. They take precedence over
# overrides: MODEL.VAL_R1 on a command line applies to the full method only.
METHODS: Mapping[str, tuple[str, ...]] = {
    "base": ("MODEL.MODE", "C", "MODEL.VAL_R1", "inf"),
    "without": ("MODEL.MODE", "GCR", "MODEL.VAL_R1", "inf"),
    "full": ("MODEL.MODE", "GCR"),
}
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
    """A training and its test; nothing is chosen by the test split.

    Attributes:
        config: YAML file of both.
        method: Key of ``METHODS``.
        folder: OUTPUT_DIR of the training; the test's folder is next to it.
        overrides: ``KEY VALUE ...`` of both.
        test_dataset: DATASETS.NAMES of the test; '' if it is the same as in training.
    """

    config: Path
    method: str
    folder: Path
    overrides: tuple[str, ...] = ()
    test_dataset: str = ""

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
        return loading.load(
            self.config,
            [
                *self.overrides,
                *METHODS[self.method],
                *(("DATASETS.NAMES", self.test_dataset) if self.test_dataset else ()),
                *("TEST.EVALUATE_ONLY", "on", "SOLVER.RESUME", "False", "EVAL.DETAILS", "on"),
                *("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(self.folder)),
                *("OUTPUT_DIR", str(self.test_folder)),
            ],
        )

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
            UserError: As for ``check_folder``, or the training failed.
        """
        self.check_folder()
        if not self.is_finished:
            # Results of an earlier test, which a run that is killed now would seem to have written.
            for name in _TEST_FILES:
                (self.test_folder / name).unlink(missing_ok=True)
            run(self.training)
            run(self.test)
        return self.results()

    def check_folder(self) -> None:
        """Raise if the folder contains a training with other values.

        Raises:
            UserError: Names the values.
        """
        other = _changed_in(self.folder, self.training, OF_A_TRAINING)
        if other:
            raise UserError(
                f"{self.folder} contains a training with {', '.join(other)}; choose another "
                f"--output, or delete {self.folder} to train again"
            )

    def differences_from(self, other: Experiment) -> list[str]:
        """Return in words the values that differ from another experiment and change numbers."""
        return differing(other.test, self.test, _OF_A_METHOD)


def _changed_in(folder: Path, cfg: CfgNode, names: tuple[str, ...]) -> list[str]:
    """Return the values that differ from the ``config.yml`` in a folder; none if it is missing."""
    path = folder / "config.yml"
    return differing(loading.load(path), cfg, names) if path.is_file() else []
