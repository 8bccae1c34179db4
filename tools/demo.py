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

from engine.distributed.group import refuse_sharing
from engine.results import Results
from tools.compare import difference_table
from tools.lib.command_line import Parser, exit_code_of
from tools.lib.experiment import METHODS, Experiment

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yml"

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
        results: Scores on the test set.
        seconds: How long training and test took; of a resumed run, its last part.
        experiment: Where both lie.
    """

    results: Results
    seconds: float
    experiment: Experiment


def train_and_test(method: str, output: Path, overrides: Sequence[str]) -> Outcome:
    """Train one method and score it on the test set, which nothing was chosen by."""
    start = time.monotonic()
    experiment = Experiment(CONFIG, method, output / method, tuple(overrides))
    return Outcome(experiment.run(), time.monotonic() - start, experiment)


def comparison(outcomes: Mapping[str, Outcome]) -> str:
    """Return the methods side by side, and which of the differences are more than luck."""
    names = list(next(iter(outcomes.values())).results.rank1)
    width = max(map(len, names)) + 2
    lines = ["rank-1 / mAP on the test set, query->gallery"]
    lines.append(f"{'':<10}" + "".join(f"{name:>{width}}" for name in names))
    for method, outcome in outcomes.items():
        rates = zip(outcome.results.rank1.values(), outcome.results.mAP.values(), strict=True)
        cells = (f"{100 * rank1:.1f} / {100 * mean:.1f}" for rank1, mean in rates)
        lines.append(f"{method:<10}" + "".join(f"{cell:>{width}}" for cell in cells))
    if len(outcomes) == len(METHODS):
        tests = [outcome.experiment.test_folder for outcome in outcomes.values()]
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


def _reading(full: Outcome) -> list[str]:
    psnr_db = full.results.psnr_db
    gain = psnr_db["recovered"] - psnr_db["anonymized"]
    matched = full.results.rank1["protected->protected"]
    test, training = full.experiment.test_folder, full.experiment.folder
    return [
        "",
        f"For {matched:.0%} of the anonymized queries the closest image in the anonymized gallery",
        f"shows the same person; recovered images are {gain:.1f} dB closer to raw than anonymized",
        "ones. Whoever has the key to an anonymized image has the photo: docs/ISED.md says why.",
        "",
        "Look next at",
        f"  {test / 'pictures.png'}    raw, desensitized, anonymized, encrypted, recovered",
        f"  {test / 'results.json'}    every number of the table above",
        f"  {training / 'pictures'}    the same people at every validation",
        f"  tensorboard --logdir {training.parent}    all curves",
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
