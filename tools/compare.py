"""Compare evaluations query by query: which differences are more than luck?"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from engine.details import DETAILS_NAME
from engine.report import DIRECTIONS
from engine.scoring.bootstrap import Interval
from engine.scoring.paired import differences, read_queries, unlike
from tools.lib.command_line import Parser, exit_code_of
from utils.errors import UserError

_EXAMPLES = """examples:
  python3 tools/compare.py demo/base-test demo/without-test demo/full-test
  python3 tools/compare.py log/mosaic-test log/blur-test

Each folder is the OUTPUT_DIR of an evaluation with EVAL.DETAILS on; every one is compared with the
one before it. Where protected images were read with another key state or scheme, a line says so.
"""


def difference_table(folders: Sequence[Path]) -> str:
    """Return the differences of each evaluation to the one before, for every direction.

    Raises:
        UserError: A folder holds no per-query results, or those of other queries or rules.
    """
    _refuse_other_rules(folders)
    tables = {folder: read_queries(folder) for folder in folders}
    read = "; ".join(f"{_name(folder)}: {table.access}" for folder, table in tables.items())
    lines = [f"protected images of {read}"]
    if warning := unlike({str(folder): table for folder, table in tables.items()}):
        lines.append(warning)
    lines.append(f"{'points on the same queries, 95 % over people':<46}{'rank-1':>24}{'mAP':>24}")
    for query, gallery in DIRECTIONS:
        direction = f"{query}->{gallery}"
        lines.append(f"  {direction}")
        for before, after in pairwise(folders):
            sides = [tables[folder].directions.get(direction, {}) for folder in (before, after)]
            found = differences(*sides)
            name = f"    {_name(after)} - {_name(before)}"
            lines.append(f"{name:<46}" + "".join(f"{points(found[k]):>24}" for k in found))
    lines.append("An interval that holds 0 shows no difference: more people or seeds may.")
    return "\n".join(lines)


def _refuse_other_rules(folders: Sequence[Path]) -> None:
    """Refuse evaluations that counted matches by different rules: models are not what differs."""
    rules: dict[bool, Path] = {}
    for folder in folders:
        path = folder / DETAILS_NAME
        if path.is_file():
            with contextlib.suppress(ValueError, LookupError, TypeError):  # no details of ours
                rules.setdefault(
                    json.loads(path.read_text("utf-8"))["raw->raw"]["cross_camera"], folder
                )
    if len(rules) > 1:
        told = " and ".join(f"{folder} with {rule}" for rule, folder in sorted(rules.items()))
        raise UserError(f"TEST.CROSS_CAMERA differs: {told}; evaluate both alike")


def _name(folder: Path) -> str:
    return folder.name.removesuffix("-test")


def points(found: Interval) -> str:
    """Return a difference of rates with its interval, in points: ``+12.0 [+8.8, +15.2]``."""
    value, low, high = (100 * bound for bound in (found.value, found.low, found.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = Parser(
        description=__doc__,
        epilog=_EXAMPLES,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="two or more")
    args = parser.parse_args(argv)
    if len(args.folders) < 2:
        parser.error("one folder was given; expected two or more")
    return exit_code_of(lambda: print(difference_table(args.folders)))


if __name__ == "__main__":
    sys.exit(main())
