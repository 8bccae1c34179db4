"""Write one HTML page about one or more runs: scores, curves, upgradation, attacks, images."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from engine.report import DIRECTIONS, headline_row
from tools.lib.command_line import Parser, add_json, answer, exit_code_of
from tools.lib.report import CARD_NAME, REPORT_NAME, write_chart, write_model_card, write_report
from tools.lib.run_files import RunFiles, read_run

_EXAMPLES = """examples:
  python3 tools/report.py demo/full-test                      one evaluation
  python3 tools/report.py demo/base-test demo/full-test       two side by side, in ./report.html
  python3 tools/report.py log/market --with-images            with images of real people
  python3 tools/report.py log/base log/full --chart both.svg  validation scores as a chart
  python3 tools/report.py demo/full-test --model-card         a model card to edit and publish

A training, an evaluation and an attack write report.html by themselves. The page needs no network
and no server. Images of real people are left out unless --with-images is given.
"""


def _scores(run: RunFiles) -> dict[str, object]:
    """Return the folder of a run and, by direction, the scores of its table."""
    names = ("rank1", "rank5", "rank10", "mAP", "mINP")
    rows = {"->".join(way): headline_row(run.results, *way) for way in DIRECTIONS if run.results}
    scores = {name: {score: row[score] for score in names} for name, row in rows.items()}
    return {"folder": str(run.folder), "retrieval": scores}


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(description="Write an HTML report of runs.", epilog=_EXAMPLES)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="output folder of a run"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"HTML file (default: {REPORT_NAME} in DIR, or in the current folder for several)",
    )
    parser.add_argument(
        "--with-images", action="store_true", help="embed images also if they show real people"
    )
    parser.add_argument(
        "--chart", type=Path, metavar="FILE",
        help="write the validation scores of several trainings as an SVG chart instead",
    )  # fmt: skip
    parser.add_argument(
        "--model-card", action="store_true",
        help=f"write a model card instead, as Markdown (default: {CARD_NAME} in DIR)",
    )  # fmt: skip
    parser.add_argument("--title", default="", help="heading of the page")
    add_json(parser)
    args = parser.parse_args(argv)
    unused = args.with_images or args.title or args.json
    if args.chart and (args.model_card or args.output or unused):
        parser.error("--chart takes folders alone, and no other option")
    if args.model_card and (len(args.folders) > 1 or unused):
        parser.error("--model-card takes one folder, and no --with-images, --title or --json")
    alone = args.folders[0] if len(args.folders) == 1 else Path()
    path = args.output or alone / (CARD_NAME if args.model_card else REPORT_NAME)

    def work() -> None:
        if args.chart:
            write_chart(args.folders, args.chart)
            print(f"The chart is {args.chart}")
            return
        if args.model_card:
            write_model_card(args.folders[0], path)
            print(f"The model card is {path}; fill in its gaps")
            return
        with answer(as_json=args.json) as show:
            write_report(args.folders, path, with_images=args.with_images, title=args.title)
            runs = [_scores(read_run(folder)) for folder in args.folders]
            show({"report": str(path), "runs": runs}, f"The report is {path}")

    return exit_code_of(work, "interrupted; no report was written")


if __name__ == "__main__":
    sys.exit(main())
