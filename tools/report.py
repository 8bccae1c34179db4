"""Write one HTML page about one or more runs: scores, curves, upgradation, attacks, images."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from tools.lib.command_line import Parser, exit_code_of
from tools.lib.report import CARD_NAME, REPORT_NAME, write_model_card, write_report

_EXAMPLES = """examples:
  python3 tools/report.py demo/full-test                      one evaluation
  python3 tools/report.py demo/base-test demo/full-test       two side by side, in ./report.html
  python3 tools/report.py log/market --with-images            with images of real people
  python3 tools/report.py demo/full-test --model-card         a model card to edit and publish

A training, an evaluation and an attack write report.html by themselves. The page needs no network
and no server. Images of real people are left out unless --with-images is given.
"""


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
        "--model-card", action="store_true",
        help=f"write a model card instead, as Markdown (default: {CARD_NAME} in DIR)",
    )  # fmt: skip
    parser.add_argument("--title", default="", help="heading of the page")
    args = parser.parse_args(argv)
    if args.model_card and (len(args.folders) > 1 or args.with_images or args.title):
        parser.error("--model-card takes one folder, and no --with-images or --title")
    alone = args.folders[0] if len(args.folders) == 1 else Path()
    path = args.output or alone / (CARD_NAME if args.model_card else REPORT_NAME)

    def work() -> None:
        if args.model_card:
            write_model_card(args.folders[0], path)
            print(f"The model card is {path}; fill in its gaps")
            return
        write_report(args.folders, path, with_images=args.with_images, title=args.title)
        print(f"The report is {path}")

    return exit_code_of(work, "interrupted; no report was written")


if __name__ == "__main__":
    sys.exit(main())
