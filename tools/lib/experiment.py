"""One cell of a table: a method trained on one data set and scored on its test split."""

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
from engine.scoring.paired import PER_QUERY_NAME
from tools.main import run
from utils.errors import UserError

# What distinguishes the three methods of the published tables; all else is the same. They win over
# overrides: MODEL.VAL_R1 on a command line is for the full method.
METHODS: Mapping[str, tuple[str, ...]] = {
    "base": ("MODEL.MODE", "C", "MODEL.VAL_R1", "inf"),
    "without": ("MODEL.MODE", "GCR", "MODEL.VAL_R1", "inf"),
    "full": ("MODEL.MODE", "GCR"),
}
# Keys that nobody may override, and what sets them.
_OWN = {
    "MODEL.MODE": f"the method ({', '.join(METHODS)})",
    "OUTPUT_DIR": "--output",
    "EVAL.DETAILS": "the test, which needs it on",
    "TEST.EVALUATE_ONLY": "the test",
}
_FILES = (RESULTS_NAME, PER_QUERY_NAME)  # of a test
# Not what a method is: published rates stand beside those of either arithmetic.
_OF_A_METHOD = tuple(name for name in OF_A_RESULT if name != "RUNTIME.PRECISION")


@dataclass(frozen=True)
class Experiment:
    """A training and its test, which nothing was chosen by.

    Attributes:
        config: YAML file that both start from.
        method: Key of ``METHODS``.
        folder: OUTPUT_DIR of the training; that of the test is beside it.
        overrides: ``KEY VALUE ...`` of both.
        test_dataset: DATASETS.NAMES of the test; '' where it is that of the training.
    """

    config: Path
    method: str
    folder: Path
    overrides: tuple[str, ...] = ()
    test_dataset: str = ""

    def __post_init__(self) -> None:
        """Refuse what would make one method out of another."""
        own = [key for key in self.overrides[::2] if key in _OWN]
        if own:
            raise UserError(f"{own[0]} is set by {_OWN[own[0]]}; leave the key out")

    @property
    def test_folder(self) -> Path:
        """OUTPUT_DIR of the test."""
        return self.folder.with_name(f"{self.folder.name}-test")

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
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
        """Whether the test has been made with these values."""
        whole = all((self.test_folder / name).is_file() for name in _FILES)
        return whole and not _changed_in(self.test_folder, self.test, OF_A_RESULT)

    def results(self) -> Results:
        """Return the results of a finished test.

        Raises:
            UserError: They are damaged.
        """
        return Results.load(self.test_folder)

    def run(self) -> Results:
        """Train and test, or do what is left of it.

        Raises:
            UserError: As for ``refuse_another``, and what stops a training.
        """
        self.refuse_another()
        if not self.is_finished:
            # Not of this test: a run that is killed before it has its own would show them.
            for name in _FILES:
                (self.test_folder / name).unlink(missing_ok=True)
            run(self.training)
            run(self.test)
        return self.results()

    def refuse_another(self) -> None:
        """Refuse a folder with a training of other values: its numbers would pass for these.

        Raises:
            UserError: Names the values.
        """
        other = _changed_in(self.folder, self.training, OF_A_TRAINING)
        if other:
            raise UserError(
                f"{self.folder} holds a training with {', '.join(other)}; give another --output, "
                f"or delete {self.folder} to train anew"
            )

    def unlike(self, other: Experiment) -> list[str]:
        """Return in words what can move a number and is not as in another experiment."""
        return differing(other.test, self.test, _OF_A_METHOD)


def _changed_in(folder: Path, cfg: CfgNode, which: tuple[str, ...]) -> list[str]:
    """Return which values are not as the configuration in a folder says; none where it has none."""
    path = folder / "config.yml"
    return differing(loading.load(path), cfg, which) if path.is_file() else []
