"""Checks of data sets without training: ``tools/data.py check``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from data import problems as wrong
from data.consistency import copy_problems, positive_problems
from data.datasets import cuhk03
from data.datasets.layout import SUBSETS, Counts, LoadedData, LoadRequest, list_folders
from data.datasets.market1501 import read_validation_tree
from data.problems import DatasetError, Problem
from data.records import DatasetSplits
from data.registry import DATASETS, load_data
from data.samplers import IdentitySampler
from data.store import undecodable
from utils.errors import UserError, naming_keys

_ABSENT = ("not-found", "kind-absent")


@dataclass(frozen=True)
class CheckOptions:
    """The settings that a data set is checked for."""

    msmt17_protocol: str = "train"  # ``train`` or ``trainval``
    cuhk03_kind: str = ""  # ``labeled`` or ``detected``; '': every kind that is present
    cross_camera: bool = True  # TEST.CROSS_CAMERA
    batch_size: int = 80  # SOLVER.IMS_PER_BATCH
    num_instances: int = 4  # DATALOADER.NUM_INSTANCE
    open_images: bool = False  # whether to decode every image


@dataclass(frozen=True)
class DataReport:
    """The result of checking one data set."""

    name: str  # as in DATASETS.NAMES
    title: str  # name in messages
    layout: str = ""  # the layout; empty if the data set cannot be loaded
    folder: str = ""  # the folder of the data set
    counts: dict[str, Counts] = field(default_factory=dict)  # size per subset
    # published size per subset, if there is one
    expected: dict[str, Counts] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # facts that reports of runs will contain
    problems: tuple[Problem, ...] = ()  # all problems

    @property
    def is_usable(self) -> bool:
        """Whether no problem is an error."""
        return all(problem.level != "error" for problem in self.problems)

    def with_warnings_for(self, code: str) -> DataReport:
        """Return the report with the errors of one code as warnings."""
        return replace(
            self,
            problems=tuple(
                replace(p, level="warning") if p.code == code else p for p in self.problems
            ),
        )


def check_root(root: Path, options: CheckOptions) -> list[DataReport]:
    """Check every data set below a folder; nothing is written.

    Raises:
        DatasetError: No data set was found; the text contains what was searched for.
    """
    reports: list[DataReport] = []
    elsewhere: list[DatasetError] = []
    absent: list[str] = []
    for request in _requests(root, options):
        try:
            reports.append(describe(load_data(request, compare_images=True), options))
        except DatasetError as error:
            if error.problem.code in ("wrong-root", "no-root"):
                elsewhere.append(error)
            elif error.problem.code in _ABSENT:
                absent.append(error.problem.text)
            else:
                reports.append(_unusable(request.name, error.problem))
    reports += _check_synthetic(root, options)
    if not reports:
        raise _nothing_found(root, elsewhere, absent)
    return reports


def check_named(name: str, root: Path, options: CheckOptions) -> list[DataReport]:
    """Check one data set by its name in DATASETS.NAMES; nothing is written."""
    if name == "synthetic":
        text = f"no synthetic data set in {root} yet; it is drawn there when it is first used"
        absent = Problem("not-found", text, "error")
        return _check_synthetic(root, options) or [_unusable(name, absent)]
    reports = []
    for request in _requests_of(name, root, options):
        try:
            reports.append(describe(load_data(request, compare_images=True), options))
        except DatasetError as error:
            reports.append(_unusable(request.name, error.problem))
    return reports


def _unusable(name: str, problem: Problem) -> DataReport:
    return DataReport(name, name, problems=(problem,))


def _requests(root: Path, options: CheckOptions) -> list[LoadRequest]:
    return [
        request
        for name in DATASETS
        if name != "synthetic" and (not name.endswith("_val") or (root / name).is_dir())
        for request in _requests_of(name, root, options)
    ]


def _requests_of(name: str, root: Path, options: CheckOptions) -> list[LoadRequest]:
    """Return the requests for a name: a folder may contain both kinds of CUHK03."""
    request = LoadRequest(name, root, options.msmt17_protocol, list_only=True)
    if name != "cuhk03":
        return [request]
    kinds = (options.cuhk03_kind,) if options.cuhk03_kind else cuhk03.kinds_present(root)
    return [replace(request, cuhk03_kind=kind) for kind in kinds]


def _check_synthetic(root: Path, options: CheckOptions) -> list[DataReport]:
    # Imported here because no other data set needs the code that draws people.
    from data.datasets.synthetic import check_complete

    reports = []
    for folder in list_folders(root):
        if (folder / "synthetic.json").is_file():
            try:
                check_complete(folder)  # as training does
                loaded = read_validation_tree(folder, LoadRequest("synthetic", root), "Synthetic")
                loaded = loaded.with_problems(*copy_problems(loaded.splits))
                reports.append(describe(loaded, options))
            except UserError as error:
                reports.append(_unusable("synthetic", Problem("incomplete", str(error), "error")))
    return reports


def _nothing_found(root: Path, elsewhere: list[DatasetError], absent: list[str]) -> DatasetError:
    # Every loader reports a root at the wrong level. Prefer one that recognised the folder's name.
    if elsewhere:
        return min(elsewhere, key=lambda error: "rename it" in error.problem.text)
    searched = "".join(f"\n  {text}" for text in absent)
    return DatasetError(
        "not-found",
        f"no data set in {root}; give the folder above the data sets, check your own data with "
        "--name folder:PATH, use drawn people (DATASETS.NAMES synthetic), or copy a data set "
        f"there:{searched}",
    )


def describe(loaded: LoadedData, options: CheckOptions) -> DataReport:
    """Return the report of a data set that could be loaded."""
    splits = loaded.splits
    problems = [*loaded.problems, *_fit_problems(splits, options)]
    if options.open_images:
        problems += bad_images(splits)
    return DataReport(
        name=splits.name,
        title=loaded.title,
        layout=loaded.layout,
        folder=str(loaded.folder),
        counts={s: Counts.of(getattr(splits, s)) for s in SUBSETS if getattr(splits, s)},
        expected=dict(loaded.expected),
        notes=dict(splits.notes),
        problems=tuple(problems),
    )


def _fit_problems(splits: DatasetSplits, options: CheckOptions) -> list[Problem]:
    """Return what would end a training or an evaluation with these options."""
    problems: list[Problem] = []
    pairs = [("test", splits.query, splits.gallery)]
    if splits.has_validation:
        pairs.append(("validation", splits.val_query, splits.val_gallery))
    for title, query, gallery in pairs:
        try:
            problems += positive_problems(
                query, gallery, cross_camera=options.cross_camera, title=title
            )
        except DatasetError as error:
            problems.append(error.problem)
    if not splits.train:  # it can still be evaluated
        return problems
    try:
        with naming_keys("SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE"):
            IdentitySampler(
                [s.pid for s in splits.train],
                batch_size=options.batch_size,
                num_instances=options.num_instances,
            )
    except UserError as error:
        problems.append(Problem("too-few-identities", str(error), "error"))
    return problems


def bad_images(splits: DatasetSplits) -> list[Problem]:
    """Decode every image; return an error that names those that cannot be decoded."""
    paths = sorted({s.path for subset in SUBSETS for s in getattr(splits, subset)})
    bad = undecodable(paths)
    if not bad:
        return []
    named = wrong.examples([f"{error.path} ({error.reason})" for error in bad], 5)
    text = (
        f"{len(bad)} of {len(paths)} images cannot be decoded: {named}; copy them again, or "
        "leave them out with CACHE.SKIP_BAD True (--skip-bad)"
    )
    return [Problem("bad-images", text, "error")]
