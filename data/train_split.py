#!/usr/bin/env python3
"""Make a validation split out of a training set: ``D/market1501`` becomes ``D/market1501_val``.

The new folder has the layout of Market-1501 with two more folders, whatever the layout of the old:
bounding_box_train, bounding_box_val_query, bounding_box_val_gallery, query, bounding_box_test.
Pictures are linked, not copied, where the file system allows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

import argparse
import shutil

from data.datasets.layout import LoadedData, LoadRequest
from data.positives import count_positives
from data.records import Sample
from data.registry import DATASETS, banner, load_data
from data.splits import STRATEGIES
from data.tree_writer import arrange, fill, market_names, refuse_existing, write_record
from tools.lib.command_line import MAX_SEED, Parser, exit_code_of, whole_number
from utils.files import staged_folder

# Data sets that are loaded with such a split, too.
NAMES = tuple(name for name in DATASETS if f"{name}_val" in DATASETS)

_EXAMPLES = """\
examples:
  python3 data/train_split.py --dataset_root_dir 'D' --dataset_name 'market1501'
  python3 data/train_split.py --dataset_root_dir 'D' --dataset_name 'msmt17' --strategy published
  python3 data/train_split.py --dataset_root_dir '/read/only' --dataset_name 'cuhk03' \\
      --output_dir '/scratch'

strategies:
  identity   20 % of the training identities, drawn with the seed, become validation; of their
             images up to 20 % become queries, one per identity and camera at most, each of which
             keeps a match in another camera. No identity is on both sides.
  published  the first 20 % of the sorted files become validation, a drawn 20 % of them queries;
             an identity may be on both sides and a query without a match. To repeat old numbers.
"""


def make_split(
    root: Path,
    name: str,
    *,
    output_dir: Path | None = None,
    strategy: str = "identity",
    seed: int = 1,
    overwrite: bool = False,
    msmt17_protocol: str = "train",
    cuhk03_kind: str = "labeled",
) -> Path:
    """Write ``<name>_val`` below ``output_dir``, or below ``root`` without one.

    Args:
        root: Folder that holds the data set; left alone where ``output_dir`` is given.
        name: One of ``NAMES``.
        output_dir: Where to write instead.
        strategy: A key of ``data.splits.STRATEGIES``.
        seed: The same seed gives the same split on every machine.
        overwrite: Replace an existing split.
        msmt17_protocol: Divide list_train (``train``) or also list_val (``trainval``).
        cuhk03_kind: ``labeled`` or ``detected``.

    Returns:
        The folder.

    Raises:
        UserError: The data cannot be read or divided, or the folder exists.
        OSError: The folder cannot be written.
    """
    target = (output_dir or root) / f"{name}_val"
    refuse_existing(target, overwrite=overwrite)
    with staged_folder(target, overwrite=overwrite) as staging:
        scratch = staging / ".extracted" if output_dir else None
        loaded = load_data(
            LoadRequest(name, root, msmt17_protocol, cuhk03_kind, extract_to=scratch)
        )
        print("\n".join(banner(loaded)))
        for problem in loaded.problems:
            print(f"{problem.level}: {problem.text}", file=sys.stderr)
        parts, names = _divide(loaded, strategy, seed)
        folders = arrange(parts, names)
        way = fill(staging, folders)
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)  # pictures in neither training nor test
        matches = count_positives(parts["val_query"], parts["val_gallery"], cross_camera=True)
        facts = {
            "dataset": name,
            "strategy": strategy,
            "seed": seed,
            "images": way,
            "queries_without_match": len(matches.without),
        }
        write_record(staging, loaded, parts, folders, facts)
    return target


def _divide(
    loaded: LoadedData, strategy: str, seed: int
) -> tuple[dict[str, tuple[Sample, ...]], dict[str, str]]:
    """Return the five subsets, and every picture's new name by its path."""
    whole = loaded.splits
    names = market_names(whole.train, loaded.market_names)
    names |= market_names((*whole.query, *whole.gallery), loaded.market_names)
    # By new name, which is the same for every layout of a data set: so is the split.
    split = STRATEGIES[strategy](whole.train, seed, name_of=lambda s: names[s.path])
    parts = {
        "train": split.train,
        "val_query": split.val_query,
        "val_gallery": split.val_gallery,
        "query": whole.query,
        "gallery": whole.gallery,
    }
    return parts, names


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(argv)
    return exit_code_of(
        lambda: _split(options),
        "interrupted: nothing was written",
        remedy="give --output_dir a folder that can be written",
    )


def _split(options: argparse.Namespace) -> None:
    """Make the split that was asked for, and say how to train with it."""
    target = make_split(
        Path(options.dataset_root_dir).expanduser(),
        options.dataset_name,
        output_dir=Path(options.output_dir).expanduser() if options.output_dir else None,
        strategy=options.strategy,
        seed=options.seed,
        overwrite=options.overwrite,
        msmt17_protocol=options.msmt17_protocol,
        cuhk03_kind=options.cuhk03_kind,
    )
    loaded = load_data(LoadRequest(target.name, target.parent))
    print("\n".join(banner(loaded)))
    print(
        f"wrote {target}; train with DATASETS.ROOT_DIR '{target.parent}' "
        f"DATASETS.NAMES \"('{target.name}')\""
    )


def _parser() -> Parser:
    parser = Parser(description="Make a validation split out of a training set.", epilog=_EXAMPLES)
    add = parser.add_argument
    add("--dataset_root_dir", required=True, metavar="D", help="folder that holds the data set")
    add("--dataset_name", required=True, choices=NAMES, help="which data set")
    add("--output_dir", metavar="O", help="write O/<name>_val and leave D alone (default: D)")
    add("--strategy", choices=tuple(STRATEGIES), default="identity", help="default: identity")
    add(
        "--seed", type=whole_number(0, MAX_SEED), default=1, help="of everything drawn (default: 1)"
    )
    add("--overwrite", action="store_true", help="replace an existing split")
    add(
        "--msmt17_protocol",
        choices=("train", "trainval"),
        default="train",
        help="divide list_train alone, or list_val too (default: train)",
    )
    add(
        "--cuhk03_kind",
        choices=("labeled", "detected"),
        default="labeled",
        help="boxes drawn by hand, or found by a detector (default: labeled)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
