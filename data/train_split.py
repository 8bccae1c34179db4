#!/usr/bin/env python3
"""Make a validation split from a training set: ``D/market1501`` becomes ``D/market1501_val``.

For every layout of the source, the new folder has the layout of Market-1501 with two more folders:
bounding_box_train, bounding_box_val_query, bounding_box_val_gallery, query, bounding_box_test.
Images are linked, not copied, if the file system allows it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

import argparse
import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from data.datasets import cuhk03, msmt17
from data.datasets.folder import resolve
from data.datasets.layout import (
    MARKET_PATTERN,
    Counts,
    LoadedData,
    LoadRequest,
    parse_market_name,
)
from data.datasets.market1501 import (
    SETTINGS,
    SPLIT_RECORD,
    VALIDATION_FOLDERS,
    read_validation_tree,
    tree_hash,
)
from data.images import IMAGE_SUFFIXES, is_image_name
from data.problems import DatasetError, queries_without_match
from data.records import Sample
from data.registry import DATASETS, banner, is_own_data, load_data
from data.splits import STRATEGIES, Parts, several_cameras
from tools.lib.command_line import MAX_SEED, Parser, add_json, answer, exit_code_of, whole_number
from utils.errors import UserError
from utils.files import existing_path, expanded, staged_folder
from utils.logger import Progress

# Published data sets for which NAME_val can be loaded.
NAMES = tuple(name for name in DATASETS if f"{name}_val" in DATASETS)

_EXAMPLES = """\
examples:
  python3 data/train_split.py --dataset_root_dir 'D' --dataset_name 'market1501'
  python3 data/train_split.py --dataset_root_dir 'D' --dataset_name 'msmt17' --strategy published
  python3 data/train_split.py --dataset_root_dir '/read/only' --dataset_name 'cuhk03' \\
      --output_dir '/scratch'
  python3 data/train_split.py --dataset_name 'folder:my/people'      # writes my/people_val
  python3 data/train_split.py --dataset_name 'csv:my/people.csv'     # writes my/people_val

strategies:
  identity   20 % of the training identities, drawn with the seed, become validation; up to 20 % of
             their images become queries, at most one per identity and camera, each with a match
             in another camera, if there are several. No identity is in both training and
             validation.
  published  the first 20 % of the sorted files become validation, a drawn 20 % of them queries;
             an identity may be in both, and queries may have no match. To reproduce old numbers.
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
    """Write ``<name>_val`` and return its folder; arguments are the options of the command line.

    Without ``output_dir`` it is written to ``root``, or to the folder that contains PATH or FILE.
    The same seed gives the same split on every machine.

    Raises:
        UserError: The data cannot be loaded or divided, or the folder exists.
        OSError: The folder cannot be written.
    """
    request = LoadRequest(name, root, msmt17_protocol, cuhk03_kind)
    target = _target(request, output_dir)
    _check_target(target, overwrite=overwrite)
    with staged_folder(target, overwrite=overwrite) as staging:
        scratch = staging / ".extracted" if output_dir else None
        loaded = load_data(replace(request, extract_to=scratch))
        _check_divisible(loaded)
        print("\n".join(banner(loaded)))
        for problem in loaded.problems:
            print(f"{problem.level}: {problem.text}", file=sys.stderr)
        parts, names = _divide(loaded, strategy, seed)
        folders = arrange(parts, names)
        way = fill(staging, folders)
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)  # images in neither training nor test
        without = queries_without_match(
            parts["val_query"],
            parts["val_gallery"],
            cross_camera=several_cameras(loaded.splits.train),
        )
        facts = {
            "dataset": name,
            "strategy": strategy,
            "seed": seed,
            "images": way,
            "queries_without_match": len(without),
        }
        if name in SETTINGS:
            field, _ = SETTINGS[name]
            facts[field] = getattr(request, field)
        write_record(staging, loaded, parts, folders, facts)
        _check_readable(staging, request)
    return target


def _check_readable(staging: Path, request: LoadRequest) -> None:
    """Raise an error if the loader does not find the images that were written."""
    read = read_validation_tree(staging, request, request.name)
    if any(problem.code == "split-changed" for problem in read.problems):
        raise DatasetError(
            "split-changed",
            f"images of {request.name} are missing when its split is loaded; name them "
            f"{MARKET_PATTERN}, with one of the suffixes {' '.join(IMAGE_SUFFIXES)}",
        )


def _target(request: LoadRequest, output_dir: Path | None) -> Path:
    if not is_own_data(request.name):
        return (output_dir or request.root) / f"{request.name}_val"
    source = resolve(request).absolute()
    title = source.stem if source.is_file() else source.resolve().name
    return (output_dir or source.parent) / f"{title}_val"


def _check_divisible(loaded: LoadedData) -> None:
    """Raise an error if a data set has a validation split already, or no training images."""
    if loaded.splits.has_validation:
        raise DatasetError(
            "has-validation",
            f"{loaded.splits.name} ({loaded.layout}) has a validation split; train on it directly",
        )
    if not loaded.splits.train:
        raise DatasetError(
            "no-training-images", f"{loaded.splits.name} has no training images to divide"
        )


def _divide(loaded: LoadedData, strategy: str, seed: int) -> tuple[Parts, dict[str, str]]:
    """Return the five subsets, and the new name of every image by its path."""
    whole = loaded.splits
    # Names in your own data contain cameras as they are numbered there.
    first = 0 if is_own_data(whole.name) else 1
    names = market_names(whole.train, loaded.market_names, first)
    names |= market_names((*whole.query, *whole.gallery), loaded.market_names, first)
    # Sorted by the new names, which every layout of a data set shares, so that the split is equal.
    parts = STRATEGIES[strategy](whole.train, seed, name_of=lambda s: names[s.path])
    return parts | {"query": whole.query, "gallery": whole.gallery}, names


def market_names(
    samples: Sequence[Sample], known: Mapping[str, str], first_camera: int = 1
) -> dict[str, str]:
    """Return a Market-style name for every image, by its path.

    A name that contains identity and camera, and ends like an image, is kept. Others (such as
    MSMT17's) become ``PPPP_cC_IIII.jpg`` with a camera without leading zeros, camera 0 being
    ``first_camera``, and IIII the index among the person's images. A suffix that is not one of an
    image, which only a table can list, becomes ``.jpg``; images are decoded by their content.

    The pids of the samples are numbered together: they are a training set, or a test set. ``known``
    has the names that the loader gives, by path.
    """
    names: dict[str, str] = {}
    numbers: Counter[int] = Counter()
    for sample in sorted(samples, key=lambda s: s.path):
        name = known.get(sample.path) or Path(sample.path).name
        who = parse_market_name(name)
        described = who and (who.pid, who.camera - first_camera) == (sample.pid, sample.camid)
        if not described or not is_image_name(name):
            suffix = Path(sample.path).suffix.lower()
            suffix = suffix if suffix in IMAGE_SUFFIXES else ".jpg"
            camera, number = sample.camid + first_camera, numbers[sample.pid]
            name = f"{sample.pid:04d}_c{camera}_{number:04d}{suffix}"
            numbers[sample.pid] += 1
        names[sample.path] = name
    return names


def arrange(parts: Parts, names: Mapping[str, str]) -> dict[str, dict[str, Path]]:
    """Assign the images to the five folders; return the paths by new name for each folder."""
    folders: dict[str, dict[str, Path]] = {name: {} for name in VALIDATION_FOLDERS.values()}
    for subset, samples in parts.items():
        folder = folders[VALIDATION_FOLDERS[subset]]
        for sample in samples:
            name = names[sample.path]
            if name in folder:
                raise DatasetError(
                    "same-name-twice",
                    f"{folder[name]} and {sample.path} would both be named {name}; rename one",
                )
            folder[name] = Path(sample.path)
    return folders


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Raise an error if the target folder exists, unless it is a split that may be overwritten."""
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(
            f"{target} exists; use it, replace it with --overwrite, or write to another folder "
            "with --output_dir"
        )
    parts = (SPLIT_RECORD, VALIDATION_FOLDERS["val_query"])
    is_split = any((target / name).exists() for name in parts)
    if target.is_symlink() or not is_split:
        raise UserError(
            f"{target} is not a validation split, so --overwrite does not delete it; move it away"
        )


def fill(staging: Path, folders: Mapping[str, Mapping[str, Path]]) -> str:
    """Create every image under its new name; return the method used for most images.

    Hard links take no space and stay valid when the original is renamed. If they are not possible,
    for example on another file system, symbolic links are used, and copies as the last resort.
    Images that were extracted into ``staging`` are moved.
    """
    ways: Counter[str] = Counter()
    with Progress(sum(map(len, folders.values())), "linking") as bar:
        for folder, names in folders.items():
            (staging / folder).mkdir()
            for name, source in names.items():
                ways[_link(source, staging / folder / name, staging)] += 1
                bar.update(1)
    return ways.most_common(1)[0][0]


def _link(source: Path, target: Path, staging: Path) -> str:
    if source.is_relative_to(staging):
        source.rename(target)
        return "extracted"
    source = source.resolve()
    attempts: dict[str, Callable[[], object]] = {
        "hard link": lambda: os.link(source, target),
        "symbolic link": lambda: target.symlink_to(source),
    }
    for way, attempt in attempts.items():
        with contextlib.suppress(OSError):
            attempt()
            return way
    shutil.copy2(source, target)
    return "copy"


def write_record(
    staging: Path,
    loaded: LoadedData,
    parts: Parts,
    folders: Mapping[str, Mapping[str, Path]],
    facts: Mapping[str, object],
) -> None:
    """Write ``split.json``: source, strategy, counts and the hash of the names."""
    record = {
        "schema": 1,
        **facts,
        "layout": loaded.layout,
        "notes": dict(loaded.splits.notes),
        "counts": {
            VALIDATION_FOLDERS[subset]: asdict(Counts.of(tuple(parts[subset])))
            for subset in VALIDATION_FOLDERS
        },
        "hash": tree_hash(
            f"{folder}/{name}" for folder, names in folders.items() for name in names
        ),
    }
    (staging / SPLIT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(argv)
    return exit_code_of(
        lambda: _split(options),
        "interrupted: nothing was written",
        remedy="give --output_dir a folder that can be written",
    )


def _split(options: argparse.Namespace) -> None:
    """Make the split, and print how to train with it."""
    name = options.dataset_name
    if name not in NAMES and not is_own_data(name):
        raise UserError(
            f"--dataset_name is {name!r}; expected one of {', '.join(NAMES)}, folder:PATH, csv:FILE"
        )
    if options.dataset_root_dir is None and not is_own_data(name):
        raise UserError(f"--dataset_name {name} needs --dataset_root_dir D")
    with answer(as_json=options.json) as show:
        target = make_split(
            existing_path(expanded(options.dataset_root_dir or ".")),
            name,
            output_dir=expanded(options.output_dir) if options.output_dir else None,
            strategy=options.strategy,
            seed=options.seed,
            overwrite=options.overwrite,
            msmt17_protocol=options.msmt17_protocol,
            cuhk03_kind=options.cuhk03_kind,
        )
        made, setting = target.name, f"DATASETS.ROOT_DIR '{target.parent}' "
        if is_own_data(name):
            made, setting = f"folder:{target}", ""
        request = LoadRequest(made, target.parent, options.msmt17_protocol, options.cuhk03_kind)
        lines = banner(load_data(request))
        lines.append(f"wrote {target}; train with {setting}DATASETS.NAMES \"('{made}')\"")
        record = json.loads((target / SPLIT_RECORD).read_text("utf-8"))
        show({"folder": target, "name": made, "split": record}, "\n".join(lines))


def _parser() -> Parser:
    parser = Parser(description="Make a validation split from a training set.", epilog=_EXAMPLES)
    add = parser.add_argument
    text = "folder that contains the data set (not needed for folder:PATH and csv:FILE)"
    add("--dataset_root_dir", metavar="D", help=text)
    text = f"{', '.join(NAMES)}, folder:PATH or csv:FILE"
    add("--dataset_name", required=True, metavar="NAME", help=text)
    add("--output_dir", metavar="O", help="write O/<name>_val and do not change D (default: D)")
    add("--strategy", choices=tuple(STRATEGIES), default="identity", help="default: identity")
    add("--seed", type=whole_number(0, MAX_SEED), default=1, help="seed of the draws (default: 1)")
    add("--overwrite", action="store_true", help="replace an existing split")
    text = "divide list_train alone, or list_val too (default: train)"
    add("--msmt17_protocol", choices=msmt17.PROTOCOLS, default="train", help=text)
    text = "boxes drawn by hand, or found by a detector (default: labeled)"
    add("--cuhk03_kind", choices=cuhk03.KINDS, default="labeled", help=text)
    add_json(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
