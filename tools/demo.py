"""The whole method on people drawn by code: train, upgrade, evaluate, and show what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from yacs.config import CfgNode

from configs import loading
from engine.checkpoint import NATIVE_NAMES
from engine.distributed.group import refuse_sharing
from engine.report import DIRECTIONS, EvalReport
from tools.command_line import Parser, exit_code_of
from tools.compare import difference_table
from tools.main import run
from utils.errors import UserError

# What a training is made of; where and how fast it runs may change on the way.
_OF_THE_TRAINING = (
    "MODEL.", "UNET.", "LOSS.", "INPUT.", "DATASETS.NAMES", "SYNTHETIC.", "MSMT17.", "CUHK03.",
    "DATALOADER.", "SOLVER.",
)  # fmt: skip
_MAY_CHANGE = (
    "MODEL.DEVICE", "MODEL.DEVICE_ID", "DATALOADER.NUM_WORKERS", "SOLVER.RESUME",
    "SOLVER.LOG_PERIOD", "SOLVER.CHECKPOINT_PERIOD",
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yml"

# What distinguishes the three methods of the published tables; all else is the same.
METHODS: Mapping[str, tuple[str, ...]] = {
    "base": ("MODEL.MODE", "C", "MODEL.VAL_R1", "inf"),
    "without": ("MODEL.MODE", "GCR", "MODEL.VAL_R1", "inf"),
    "full": ("MODEL.MODE", "GCR"),
}
_MEANING = {
    "base": "re-ID trained on raw and mosaic images",
    "without": "joint model, no supervision upgradation",
    "full": "joint model with supervision upgradation",
}
_EXAMPLES = """examples:
  python3 tools/demo.py                         the full method, some eight minutes on two cores
  python3 tools/demo.py --compare               base, without and full alike, side by side
  python3 tools/demo.py INPUT.TYPE blur INPUT.RADIUS 6.0 --output ./demo-blur

An interrupted demo goes on where it stopped when it is started again.
"""


@dataclass(frozen=True)
class Outcome:
    """One method, trained and tested.

    Attributes:
        report: Scores on the test set.
        seconds: How long training and test took; of a resumed run, its last part.
        folder: Where its training lies; the test is beside it.
    """

    report: EvalReport
    seconds: float
    folder: Path


def train_and_test(method: str, output: Path, overrides: Sequence[str]) -> Outcome:
    """Train one method and score it on the test set, which nothing was chosen by."""
    folder = output / method
    start = time.monotonic()
    common = (*METHODS[method], *overrides)
    resume = str((folder / NATIVE_NAMES["latest"]).exists())
    training = [*common, "OUTPUT_DIR", str(folder), "SOLVER.RESUME", resume]
    cfg = loading.load(CONFIG, training)
    _refuse_another(cfg, folder)
    run(cfg)
    test = ("TEST.EVALUATE_ONLY", "on", "MODEL.PRETRAIN_CHOICE", "self", "SOLVER.RESUME", "False")
    where = (
        "MODEL.PRETRAIN_DIR",
        str(folder),
        "OUTPUT_DIR",
        str(_test_folder(folder)),
        "EVAL.DETAILS",
        "on",
    )
    report = run(loading.load(CONFIG, [*common, *test, *where]))
    assert report is not None  # the demo is one process
    return Outcome(report, time.monotonic() - start, folder)


def _refuse_another(cfg: CfgNode, folder: Path) -> None:
    """Refuse to go on with a demo of other values: its old numbers would pass for theirs.

    Raises:
        UserError: Names the values.
    """
    path = folder / "config.yml"
    if not path.is_file():
        return
    other = [
        f"{name} {was} (now {now})"
        for name, (was, now) in loading.changes(loading.load(path), cfg).items()
        if name.startswith(_OF_THE_TRAINING) and name not in _MAY_CHANGE
    ]
    if other:
        raise UserError(
            f"{folder} holds a demo with {', '.join(other)}; give another --output, or delete "
            f"{folder} to train anew"
        )


def comparison(outcomes: Mapping[str, Outcome]) -> str:
    """Return the methods side by side, and which of the differences are more than luck."""
    names = [f"{query}->{gallery}" for query, gallery in DIRECTIONS]
    width = max(map(len, names)) + 2
    lines = ["rank-1 / mAP on the test set, query->gallery"]
    lines.append(f"{'':<10}" + "".join(f"{name:>{width}}" for name in names))
    for method, outcome in outcomes.items():
        rows = [outcome.report.row(*direction) for direction in DIRECTIONS]
        cells = (f"{100 * row.rank1:.1f} / {100 * row.mAP:.1f}" for row in rows)
        lines.append(f"{method:<10}" + "".join(f"{cell:>{width}}" for cell in cells))
    if len(outcomes) == len(METHODS):
        tests = [_test_folder(outcome.folder) for outcome in outcomes.values()]
        lines += ["", difference_table(tests)]
    return "\n".join(lines)


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Return what a reader should take home: tables, what they mean, where to look next."""
    lines = ["", "=" * 78, comparison(outcomes), ""]
    for method, outcome in outcomes.items():
        lines.append(f"{method}: {_MEANING[method]}; {outcome.seconds / 60:.1f} minutes")
    if "full" in outcomes:
        lines += _reading(outcomes["full"])
    return "\n".join(lines)


def _test_folder(training: Path) -> Path:
    return training.with_name(f"{training.name}-test")


def _reading(full: Outcome) -> list[str]:
    quality = full.report.image_quality
    gain = quality["recovered"].psnr_db - quality["anonymized"].psnr_db
    matched = full.report.row("protected", "protected").rank1
    test = _test_folder(full.folder)
    return [
        "",
        f"For {matched:.0%} of the anonymized queries the closest image in the anonymized gallery",
        f"shows the same person; recovered images are {gain:.1f} dB closer to raw than anonymized",
        "ones. Whoever has the key to an anonymized image has the photo: docs/ISED.md says why.",
        "",
        "Look next at",
        f"  {test / 'pictures.png'}    raw, desensitized, anonymized, encrypted, recovered",
        f"  {test / 'results.json'}    every number of the table above",
        f"  {full.folder / 'pictures'}    the same people at every validation",
        f"  tensorboard --logdir {full.folder.parent}    all curves",
        "  README.md    the same on Market-1501, MSMT17, CUHK03 or your own pictures",
    ]


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(
        description="Train and test the method on the synthetic data set.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--compare", action="store_true", help="train base and without as well")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder (default: demo)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys that override the file")
    args = parser.parse_intermixed_args(argv)  # keys may stand on both sides of an option
    methods = list(METHODS) if args.compare else ["full"]

    def work() -> None:
        refuse_sharing("tools/demo.py")
        outcomes = {name: train_and_test(name, args.output, args.opts) for name in methods}
        print(summary(outcomes))

    return exit_code_of(work, "interrupted; the same command goes on where it stopped")


if __name__ == "__main__":
    sys.exit(main())
