#!/usr/bin/env python3
"""Check data sets, draw contact sheets of them, and draw people to try the commands with."""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

import argparse
from dataclasses import asdict, replace

from data.checks import (
    CheckOptions,
    DataReport,
    check_named,
    check_root,
    contact_sheet,
    requests,
)
from data.datasets import cuhk03
from data.datasets.layout import Counts, LoadRequest
from data.datasets.synthetic import SyntheticOptions, draw_folders
from data.records import DatasetSplits, Sample
from data.registry import is_own_data, load_data
from tools.lib.command_line import Parser, add_json, answer, exit_code_of, shown, whole_number
from utils.errors import UserError
from utils.files import atomic_write, existing_path, expanded

_PARTS = {
    "train": ("train",),
    "validation": ("val_query", "val_gallery"),
    "test": ("query", "gallery"),
}

_EXAMPLES = """\
examples:
  python3 tools/data.py check --root D
  python3 tools/data.py check --root D --images            # also decode every image
  python3 tools/data.py check --root D --name folder:my-people --no-cross-camera
  python3 tools/data.py check --root D --json
  python3 tools/data.py sheet --root D --name market1501 --output sheet.png
  python3 tools/data.py sheet --root D --name folder:own --part test --output sheet.png
  python3 tools/data.py draw people                       # folder:people, none of whom exists

Exit code: 0 all data sets that were found can be used, 1 one cannot, 2 wrong input,
130 interrupted.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    options = _parser().parse_args(argv)
    act = {"check": _check, "sheet": _sheet, "draw": _draw}[options.command]
    return exit_code_of(
        lambda: act(options), remedy="check that the folders can be read and written"
    )


def _sheet(options: argparse.Namespace) -> int:
    """Draw a contact sheet, on which wrong identities and cameras are visible."""
    if not options.root.is_dir():
        raise UserError(f"--root {options.root} is not a folder; give the one with the data sets")
    if options.output.suffix.lower() != ".png":
        raise UserError(f"--output {options.output} is not the name of a PNG file; give NAME.png")
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output} exists; give another --output, or --overwrite")
    wanted = CheckOptions(options.msmt17_protocol, options.cuhk03_kind or "")
    request = requests(options.name, options.root, wanted)[0]
    loaded = load_data(replace(request, list_only=False))
    for problem in loaded.problems:
        print(shown(f"{problem.level}: {problem.text}"), file=sys.stderr)
    sheet = contact_sheet(
        _part(loaded.splits, options.part),
        people=options.people,
        cameras=options.cameras,
        names=loaded.identity_names,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.output) as temporary:
        sheet.image.save(temporary, format="PNG")
    for error in sheet.bad:
        text = f"error: {error.path}: {error.reason}; it is black on the sheet"
        print(shown(text), file=sys.stderr)
    people = [loaded.identity_names.get(pid, str(pid)) for pid in sheet.pids]
    counted = "" if is_own_data(options.name) else ", counted from 0"
    lines = (
        f"{shown(str(options.output))}: tiles without an image are grey",
        f"  rows, people: {shown(', '.join(people))}",
        f"  columns, cameras{counted}: {', '.join(map(str, sheet.camids))}",
    )
    with answer(as_json=options.json) as show:
        content = {"sheet": options.output, "people": people, "cameras": sheet.camids}
        show(content | {"bad": [error.path for error in sheet.bad]}, "\n".join(lines))
    return 1 if sheet.bad else 0


def _draw(options: argparse.Namespace) -> int:
    """Draw people, to try the commands with."""
    size = SyntheticOptions(options.identities, options.cameras, options.images, options.seed)
    draw_folders(options.output, size)
    loaded = load_data(LoadRequest(f"folder:{options.output}", Path()))
    with answer(as_json=options.json) as show:
        folders = {name: options.output / name for name in ("train", "query", "gallery")}
        counts = {name: asdict(Counts.of(getattr(loaded.splits, name))) for name in folders}
        lines = [
            f"{shown(str(folder))}: {counts[name]['ids']} people, {counts[name]['images']} images, "
            f"{counts[name]['cameras']} cameras"
            for name, folder in folders.items()
        ]
        show({"folder": options.output, "counts": counts}, "\n".join(lines))
    return 0


def _part(splits: DatasetSplits, part: str) -> list[Sample]:
    """Return the samples of a part; of a gallery only those of identities with queries."""
    subsets = [getattr(splits, subset) for subset in _PARTS[part]]
    if not subsets[0]:
        present = [name for name, (first, *_) in _PARTS.items() if getattr(splits, first)]
        raise UserError(f"{splits.name} has no {part} images; --part can be {' or '.join(present)}")
    people = {sample.pid for sample in subsets[0]}
    return [sample for subset in subsets for sample in subset if sample.pid in people]


def _check(options: argparse.Namespace) -> int:
    """Print the reports; return the exit code."""
    with answer(as_json=options.json) as show:
        reports = _reports(options)
        text = "\n\n".join(_as_text(report) for report in reports)
        show([asdict(report) for report in reports], text)
    return 0 if all(report.is_usable for report in reports) else 1


def _reports(options: argparse.Namespace) -> list[DataReport]:
    root = options.root
    wanted = CheckOptions(
        msmt17_protocol=options.msmt17_protocol,
        cuhk03_kind=options.cuhk03_kind or "",
        cross_camera=not options.no_cross_camera,
        batch_size=options.batch,
        num_instances=options.instances,
        open_images=options.images,
        skip_bad=options.skip_bad,
    )
    if options.name:
        return check_named(options.name, root, wanted)
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder; give the one with the data sets")
    return check_root(root, wanted)


def _as_text(report: DataReport) -> str:
    lines = [f"{report.name}: {'ok' if report.is_usable else 'NOT USABLE'}"]
    if report.layout:
        lines += [f"  layout  {report.layout}", f"  folder  {report.folder}"]
    for subset, found in report.counts.items():
        verdict = ""
        if subset in report.expected:
            expected = report.expected[subset]
            verdict = "  as expected" if expected == found else f"  expected {expected}"
        lines.append(f"  {subset:<12} found {found}{verdict}")
    lines += [f"  {key:<8} {value}" for key, value in report.notes.items() if key != "layout"]
    lines += [f"  {problem.level}: {problem.text}" for problem in report.problems]
    if not report.problems:
        lines.append("  no problems")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(description=__doc__, epilog=_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = Parser(add_help=False)
    shared.add_argument(
        "--root", required=True, type=_folder, metavar="D", help="folder with the data sets"
    )
    shared.add_argument("--msmt17-protocol", choices=("train", "trainval"), default="train")
    shared.add_argument(
        "--cuhk03-kind", choices=cuhk03.KINDS, help="default: every kind that is present"
    )
    text = "print layout, counts and problems of every data set below a folder"
    check = commands.add_parser("check", help=text, epilog=_EXAMPLES, parents=[shared])
    text = "draw people as rows and cameras as columns, which shows wrong numbers"
    sheet = commands.add_parser("sheet", help=text, epilog=_EXAMPLES, parents=[shared])
    text = "draw people, none of whom exists, into folders: a data set to try commands with"
    draw = commands.add_parser("draw", help=text, epilog=_EXAMPLES)
    for command, add_options in (
        (check, _add_check_options), (sheet, _add_sheet_options), (draw, _add_draw_options),
    ):  # fmt: skip
        add_options(command)
        add_json(command)
    return parser


def _folder(text: str) -> Path:
    return existing_path(expanded(text))


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--name", help="check only this data set; a name as in DATASETS.NAMES")
    add("--images", action="store_true", help="decode every image, which finds truncated ones")
    text = "damaged images are a warning: training leaves them out"
    add("--skip-bad", action="store_true", help=text)
    add("--no-cross-camera", action="store_true", help="matches may be from the same camera")
    text = "SOLVER.IMS_PER_BATCH to check against (80)"
    add("--batch", type=whole_number(1), default=80, help=text)
    text = "DATALOADER.NUM_INSTANCE to check against (4)"
    add("--instances", type=whole_number(2, 1024), default=4, help=text)


def _add_sheet_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--name", required=True, help="a name as in DATASETS.NAMES")
    add("--output", required=True, type=_folder, metavar="FILE", help="PNG file to write")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--part", choices=tuple(_PARTS), default="train", help="which images (train)")
    add("--people", type=whole_number(1, 500), default=6, help="rows, by number or name (6)")
    add("--cameras", type=whole_number(1, 500), default=6, help="columns (6)")


def _add_draw_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", type=Path, help="folder to create: train, query and gallery, a folder per person")
    add("--identities", type=int, default=32, help="for training; half as many for test (32)")
    add("--cameras", type=int, default=3, help="cameras, all of which see every person (3)")
    add("--images", type=int, default=4, help="images of a person by one camera (4)")
    add("--seed", type=int, default=2, help="another seed draws other people (2)")


if __name__ == "__main__":
    sys.exit(main())
