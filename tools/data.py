#!/usr/bin/env python3
"""Look over data sets: which there are, whether they are whole, and what is wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from data.checks import CheckOptions, DataReport, check_named, check_root
from data.datasets import cuhk03
from data.records import DatasetSplits, Sample
from data.registry import load_splits
from data.sheet import contact_sheet
from tools.lib.command_line import Parser, exit_code_of, shown, whole_number
from utils.errors import UserError
from utils.files import atomic_write

_PARTS = {
    "train": ("train",),
    "validation": ("val_query", "val_gallery"),
    "test": ("query", "gallery"),
}

_EXAMPLES = """\
examples:
  python3 tools/data.py check --root D
  python3 tools/data.py check --root D --images            # open every picture, too
  python3 tools/data.py check --root D --name folder:my-people --no-cross-camera
  python3 tools/data.py check --root D --json
  python3 tools/data.py sheet --root D --name market1501 --output sheet.png
  python3 tools/data.py sheet --root D --name folder:own --part test --output sheet.png

Exit code: 0 done, and every data set that was found is usable, 1 one is not, 2 wrong input,
130 interrupted.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    options = _parser().parse_args(argv)
    act = {"check": _check, "sheet": _sheet}[options.command]
    return exit_code_of(lambda: act(options), remedy="see that the folders can be read and written")


def _sheet(options: argparse.Namespace) -> int:
    """Draw people as rows and cameras as columns: wrong numbers are seen at once."""
    if not options.root.is_dir():
        raise UserError(f"--root {options.root} is not a folder; give the one with the data sets")
    if options.output.suffix.lower() != ".png":
        raise UserError(f"--output {options.output} is no name of a PNG file; give NAME.png")
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists; give another --output, or --overwrite")
    splits = load_splits(
        options.name,
        options.root,
        msmt17_protocol=options.msmt17_protocol,
        cuhk03_kind=options.cuhk03_kind or cuhk03.kinds_present(options.root)[0],
    )
    sheet = contact_sheet(
        _part(splits, options.part), people=options.people, cameras=options.cameras
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.output) as temporary:
        sheet.image.save(temporary, format="PNG")
    for error in sheet.bad:
        told = f"error: {error.path}: {error.reason}; it is black on the sheet"
        print(shown(told), file=sys.stderr)
    print(f"{shown(str(options.output))}: grey where there is no picture")
    print(f"  rows, people: {_numbers(sheet.pids)}")
    print(f"  columns, cameras, counted from 0: {_numbers(sheet.camids)}")
    return 1 if sheet.bad else 0


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _part(splits: DatasetSplits, part: str) -> list[Sample]:
    """Return the pictures of a part; of a gallery only those of people who are looked for."""
    subsets = [getattr(splits, subset) for subset in _PARTS[part]]
    if not subsets[0]:
        there = [name for name, (first, *_) in _PARTS.items() if getattr(splits, first)]
        raise UserError(f"{splits.name} has no {part} pictures; --part can be {' or '.join(there)}")
    people = {sample.pid for sample in subsets[0]}
    return [sample for subset in subsets for sample in subset if sample.pid in people]


def _check(options: argparse.Namespace) -> int:
    """Print what is found; returns the exit code."""
    root = options.root
    wanted = CheckOptions(
        msmt17_protocol=options.msmt17_protocol,
        cuhk03_kind=options.cuhk03_kind or "",
        cross_camera=not options.no_cross_camera,
        batch_size=options.batch,
        num_instances=options.instances,
        open_images=options.images,
    )
    if options.name:
        reports = check_named(options.name, root, wanted)
    elif root.is_dir():
        reports = check_root(root, wanted)
    else:
        raise UserError(f"--root {root} is not a folder; give the one that holds the data sets")
    if options.skip_bad:
        reports = [report.forgiving("bad-images") for report in reports]
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        print("\n\n".join(_as_text(report) for report in reports))
    return 0 if all(report.is_usable for report in reports) else 1


def _as_text(report: DataReport) -> str:
    lines = [f"{report.name}: {'ok' if report.is_usable else 'NOT USABLE'}"]
    if report.layout:
        lines += [f"  layout  {report.layout}", f"  folder  {report.folder}"]
    for subset, found in report.counts.items():
        expected = report.expected.get(subset)
        if expected is None:
            verdict = ""
        elif expected == found:
            verdict = "  as expected"
        else:
            verdict = f"  expected {expected}"
        lines.append(f"  {subset:<12} found {found}{verdict}")
    lines += [f"  {key:<8} {value}" for key, value in report.notes.items()]
    lines += [f"  {problem.level}: {problem.text}" for problem in report.problems]
    if not report.problems:
        lines.append("  no problems")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(description="Look over data sets.", epilog=_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = Parser(add_help=False)
    shared.add_argument(
        "--root", required=True, type=_folder, metavar="D", help="folder that holds the data sets"
    )
    shared.add_argument("--msmt17-protocol", choices=("train", "trainval"), default="train")
    shared.add_argument("--cuhk03-kind", choices=cuhk03.KINDS, help="default: what lies there")
    _add_check_options(
        commands.add_parser(
            "check",
            help="print layout, counts and problems of every data set below a folder",
            epilog=_EXAMPLES,
            parents=[shared],
        )
    )
    _add_sheet_options(
        commands.add_parser(
            "sheet",
            help="draw people as rows and cameras as columns, which shows wrong numbers at once",
            epilog=_EXAMPLES,
            parents=[shared],
        )
    )
    return parser


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--name", help="check this one alone: a name that DATASETS.NAMES takes")
    add("--images", action="store_true", help="open every picture; finds truncated ones")
    add("--skip-bad", action="store_true", help="bad pictures are a warning: training skips them")
    add("--no-cross-camera", action="store_true", help="matches may come from the same camera")
    add(
        "--batch",
        type=whole_number(1),
        default=80,
        help="SOLVER.IMS_PER_BATCH to check against (80)",
    )
    add(
        "--instances",
        type=whole_number(2, 1024),
        default=4,
        help="DATALOADER.NUM_INSTANCE to check against (4)",
    )
    add("--json", action="store_true", help="print JSON for scripts")


def _add_sheet_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--name", required=True, help="a name that DATASETS.NAMES takes")
    add("--output", required=True, type=_folder, metavar="FILE", help="PNG file to write")
    add("--overwrite", action="store_true", help="replace the file if it is there")
    add("--part", choices=tuple(_PARTS), default="train", help="which pictures (train)")
    add("--people", type=whole_number(1, 500), default=6, help="rows, the lowest number first (6)")
    add("--cameras", type=whole_number(1, 500), default=6, help="columns (6)")


if __name__ == "__main__":
    sys.exit(main())
