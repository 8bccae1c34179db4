"""Train, upgrade and test the method on drawn people, and print what the numbers mean."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from yacs.config import CfgNode

from data.build import build_splits
from engine.distributed.processes import refuse_sharing
from engine.report import RESULTS_NAME, Results
from tools.benchmarks.measuring import seconds
from tools.benchmarks.step import evaluation_flops, make_step, step_flops
from tools.lib.command_line import Parser, add_json, answer, exit_code_of
from tools.lib.run import METHODS, Experiment
from tools.lib.tables import Comparison
from utils.device import resolve_device, set_threads

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yml"
_TIMED_STEPS = 3

_MEANING = {
    "base": "re-ID trained on raw and mosaic images",
    "without": "joint model, no supervision upgradation",
    "full": "joint model with supervision upgradation",
}
_NEXT_STEPS = """

Report: {}    scores, images, curves and upgradation on one page
Next:   make attack    what attackers achieve against each protection
        python3 tools/visualize.py ranks {}    ranked lists of queries"""
_EXAMPLES = """examples:
  python3 tools/demo.py                         the full method
  python3 tools/demo.py --compare               base, without and full, with their differences
  python3 tools/demo.py INPUT.TYPE blur INPUT.RADIUS 3.0 --output ./demo-blur

The expected time on this machine is printed at the start. The same command resumes an interrupted
demo.
"""


@dataclass(frozen=True)
class Outcome:
    """The results of one method."""

    results: Results  # scores on the test set
    seconds: float  # duration of training and test; in a resumed demo, of its last part
    experiment: Experiment  # the training and the test, with their folders


def expected_seconds(experiments: Sequence[Experiment]) -> float:
    """Return the expected duration of some trainings and tests on this machine.

    Measures the FLOP/s of a few training steps of the last experiment and counts the FLOPs of all.
    """
    measured = experiments[-1]
    cfg, keys = measured.training, (*measured.overrides, *METHODS[measured.method])
    set_threads(cfg.RUNTIME.THREADS)
    count, device = cfg.SOLVER.IMS_PER_BATCH, resolve_device(cfg.MODEL.DEVICE)
    step = make_step((str(measured.config), keys, str(device)), count, 1)
    step()  # the first step allocates memory
    step_s = min(seconds(step, device) for _ in range(_TIMED_STEPS))
    flops_per_s = count * step_flops(cfg) / step_s
    return sum(_flops(experiment.training) for experiment in experiments) / flops_per_s


def _flops(cfg: CfgNode) -> float:
    """Return the floating-point operations of a training, its validations and its test."""
    splits, epochs = build_splits(cfg), cfg.SOLVER.MAX_EPOCHS
    validated = epochs // cfg.SOLVER.VAL_PERIOD * len(splits.val_query + splits.val_gallery)
    return (
        step_flops(cfg) * epochs * len(splits.train)
        + evaluation_flops(cfg, 2) * validated
        # The test also embeds decrypted, wrongly decrypted and encrypted images.
        + evaluation_flops(cfg, 5) * len(splits.query + splits.gallery)
    )


def comparison(outcomes: Mapping[str, Outcome]) -> str:
    """Return the scores of the methods side by side, and intervals of their differences."""
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
        lines += ["", Comparison.of(tests).table()]
    return "\n".join(lines)


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """Return the tables and their meaning."""
    lines = ["", "=" * 78, comparison(outcomes), ""]
    for method, outcome in outcomes.items():
        lines.append(f"{method}: {_MEANING[method]}; {outcome.seconds / 60:.1f} minutes")
    if "full" in outcomes:
        results = outcomes["full"].results
        matched = results.rank1["protected->protected"]
        lines += [
            "",
            f"For {matched:.0%} of the anonymized queries the closest image in the anonymized "
            "gallery\nshows the same person.",
        ]
        gain = results.psnr_db["recovered"] - results.psnr_db["anonymized"]
        if gain > 0:  # a shortened demo learns no recovery
            lines.append(
                f"Recovered images are {gain:.1f} dB closer to raw than anonymized ones, so the "
                "key to\nan anonymized image is the key to the raw image (docs/ISED.md)."
            )
    return "\n".join(lines)


def report(outcomes: Mapping[str, Outcome], output: Path) -> Path:
    """Write one HTML page about all runs; return its path."""
    from tools.lib.report import REPORT_NAME, write_report  # loads matplotlib

    experiments = [outcome.experiment for outcome in outcomes.values()]
    folders = [experiment.test_folder for experiment in experiments]
    folders += [experiment.folder for experiment in experiments]
    return write_report(folders, output / REPORT_NAME, title="The method on synthetic people")


def _as_json(outcomes: Mapping[str, Outcome], report_path: Path) -> dict[str, object]:
    """Return the path of the report, and the results.json of each method."""
    results = {
        name: (outcome.experiment.test_folder / RESULTS_NAME).read_text("utf-8")
        for name, outcome in outcomes.items()
    }
    methods = {name: json.loads(text) for name, text in results.items()}
    return {"report": str(report_path), "methods": methods}


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = Parser(
        description="Train and test the method on the synthetic data set.", epilog=_EXAMPLES
    )
    parser.add_argument(
        "--compare", action="store_true", help="also train the methods base and without"
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder (default: demo)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys that override the file")
    add_json(parser)
    args = parser.parse_intermixed_args(argv)  # options may follow keys
    methods = list(METHODS) if args.compare else ["full"]

    def work() -> None:
        with answer(as_json=args.json) as show:
            outcomes = run()
            path = report(outcomes, args.output)
            checkpoint = list(outcomes.values())[-1].experiment.folder
            show(_as_json(outcomes, path), summary(outcomes) + _NEXT_STEPS.format(path, checkpoint))

    def run() -> dict[str, Outcome]:
        refuse_sharing("tools/demo.py")
        experiments = {
            name: Experiment(CONFIG, name, args.output / name, tuple(args.opts)) for name in methods
        }
        for experiment in experiments.values():
            experiment.check_folder()
        remaining = [each for each in experiments.values() if not each.is_finished]
        if remaining:
            print("Measuring the speed of this machine.", flush=True)
            minutes = expected_seconds(remaining) / 60
            print(f"Expected time on this machine: about {max(1, round(minutes))} minutes.")
        outcomes = {}
        for name, experiment in experiments.items():
            start = time.monotonic()
            results = experiment.run()
            outcomes[name] = Outcome(results, time.monotonic() - start, experiment)
        return outcomes

    return exit_code_of(work, "interrupted; the same command resumes the demo")


if __name__ == "__main__":
    sys.exit(main())
