"""Compare evaluations query by query: which differences are larger than chance?"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from tools.lib.command_line import Parser, add_json, answer, exit_code_of
from tools.lib.tables import Comparison

_EXAMPLES = """examples:
  python3 tools/compare.py demo/base-test demo/without-test demo/full-test
  python3 tools/compare.py log/mosaic-test log/blur-test

Each folder is the OUTPUT_DIR of an evaluation with EVAL.DETAILS on. Each evaluation is compared
with the one before it. A line reports evaluations whose protected images were read with different
keys or encryption schemes.
"""


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = Parser(description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="two or more")
    add_json(parser)
    args = parser.parse_args(argv)
    if len(args.folders) < 2:
        parser.error("one folder was given; expected two or more")

    def work() -> None:
        with answer(as_json=args.json) as show:
            comparison = Comparison.of(args.folders)
            show(comparison.to_json(), comparison.table())

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main())
