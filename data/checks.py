"""Looking data sets over: before training, and for ``tools/data.py check``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from data import problems as wrong
from data.datasets import cuhk03
from data.datasets.layout import SUBSETS, Counts, LoadedData, LoadRequest, list_folders
from data.datasets.market1501 import read_validation_tree
from data.images import BadImage, read_rgb
from data.positives import positive_problems
from data.problems import DatasetError, Problem
from data.records import DatasetSplits
from data.registry import DATASETS, load_data
from data.samplers import IdentitySampler
from utils.errors import UserError, naming_keys
from utils.progress import Progress

_ABSENT = ("not-found", "kind-absent")


@dataclass(frozen=True)
class CheckOptions:
    """What a data set is held against.

    Attributes:
        msmt17_protocol: ``train`` or ``trainval``.
        cuhk03_kind: ``labeled`` or ``detected``; '' for all there are.
        cross_camera: TEST.CROSS_CAMERA.
        batch_size: SOLVER.IMS_PER_BATCH.
        num_instances: DATALOADER.NUM_INSTANCE.
        open_images: Decode every picture.
    """

    msmt17_protocol: str = "train"
    cuhk03_kind: str = ""
    cross_camera: bool = True
    batch_size: int = 80
    num_instances: int = 4
    open_images: bool = False


@dataclass(frozen=True)
class DataReport:
    """What was found out about one data set.

    Attributes:
        name: As DATASETS.NAMES wants it.
        title: For people.
        layout: Which of the known layouts, empty if it cannot be loaded.
        folder: Where it lies.
        counts: Found per subset.
        expected: Published per subset, where there is such a number.
        notes: Facts that results will carry.
        problems: Everything found wrong.
    """

    name: str
    title: str
    layout: str = ""
    folder: str = ""
    counts: dict[str, Counts] = field(default_factory=dict)
    expected: dict[str, Counts] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether nothing found stops a training."""
        return all(problem.level != "error" for problem in self.problems)

    def forgiving(self, code: str) -> DataReport:
        """Return the same with the problems of one name turned into warnings."""
        return replace(
            self,
            problems=tuple(
                replace(p, level="warning") if p.code == code else p for p in self.problems
            ),
        )


def check_root(root: Path, options: CheckOptions) -> list[DataReport]:
    """Look over every data set below a folder; nothing is written.

    Raises:
        DatasetError: There is none; the text says what was looked for.
    """
    reports: list[DataReport] = []
    elsewhere: list[DatasetError] = []
    absent: list[str] = []
    for request in _requests(root, options):
        try:
            reports.append(describe(load_data(request), options))
        except DatasetError as error:
            if error.problem.code in ("wrong-root", "no-root"):
                elsewhere.append(error)
            elif error.problem.code in _ABSENT:
                absent.append(error.problem.text)
            else:
                reports.append(_unusable(request.name, error.problem))
    reports += _synthetic_sets(root, options)
    if not reports:
        raise _nothing_found(root, elsewhere, absent)
    return reports


def check_named(name: str, root: Path, options: CheckOptions) -> list[DataReport]:
    """Look over one data set, by the name that DATASETS.NAMES takes; nothing is written."""
    if name == "synthetic":
        text = f"no drawn people in {root} yet; they are drawn there when they are first used"
        absent = Problem("not-found", text, "error")
        return _synthetic_sets(root, options) or [_unusable(name, absent)]
    return [_checked(request, options) for request in _requests_of(name, root, options)]


def _checked(request: LoadRequest, options: CheckOptions) -> DataReport:
    try:
        return describe(load_data(request), options)
    except DatasetError as error:
        return _unusable(request.name, error.problem)


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
    """Return what to load under a name: CUHK03 may lie there in two kinds."""
    request = LoadRequest(name, root, options.msmt17_protocol, list_only=True)
    if name != "cuhk03":
        return [request]
    kinds = (options.cuhk03_kind,) if options.cuhk03_kind else cuhk03.kinds_present(root)
    return [replace(request, cuhk03_kind=kind) for kind in kinds]


def _synthetic_sets(root: Path, options: CheckOptions) -> list[DataReport]:
    # Imported here: drawing people is code that no other data set needs.
    from data.datasets.synthetic import check_complete

    reports = []
    for folder in list_folders(root):
        if (folder / "synthetic.json").is_file():
            try:
                check_complete(folder)  # as training does
                loaded = read_validation_tree(folder, LoadRequest("synthetic", root), "Synthetic")
                reports.append(describe(loaded, options))
            except UserError as error:
                problem = Problem("incomplete", str(error), "error")
                reports.append(DataReport("synthetic", "Synthetic", problems=(problem,)))
    return reports


def _nothing_found(root: Path, elsewhere: list[DatasetError], absent: list[str]) -> DatasetError:
    # One wrong level looks wrong to every loader; the one that knows the folder's name knows best.
    if elsewhere:
        return min(elsewhere, key=lambda error: "rename it" in error.problem.text)
    looked_for = "".join(f"\n  {text}" for text in absent)
    return DatasetError(
        "not-found",
        f"no data set in {root}; give the folder above them, check one's own data with --name "
        f"folder:PATH, let people be drawn (DATASETS.NAMES synthetic), or bring one:{looked_for}",
    )


def describe(loaded: LoadedData, options: CheckOptions) -> DataReport:
    """Say all there is to say about a data set that could be loaded."""
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
    """What would stop a training or an evaluation with these settings."""
    found: list[Problem] = []
    pairs = [("test", splits.query, splits.gallery)]
    if splits.has_validation:
        pairs.append(("validation", splits.val_query, splits.val_gallery))
    for title, query, gallery in pairs:
        try:
            found += positive_problems(
                query, gallery, cross_camera=options.cross_camera, title=title
            )
        except DatasetError as error:
            found.append(error.problem)
    try:
        with naming_keys("SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE"):
            IdentitySampler(
                [s.pid for s in splits.train],
                batch_size=options.batch_size,
                num_instances=options.num_instances,
            )
    except UserError as error:
        found.append(Problem("too-few-identities", str(error), "error"))
    return found


def bad_images(splits: DatasetSplits) -> list[Problem]:
    """Decode every picture, and name those that cannot be."""
    paths = sorted({s.path for subset in SUBSETS for s in getattr(splits, subset)})
    bad: list[BadImage] = []
    with ThreadPoolExecutor() as pool, Progress(len(paths), "opening pictures") as bar:
        for error in pool.map(_open, paths):
            if error is not None:
                bad.append(error)
            bar.update(1)
    if not bad:
        return []
    named = wrong.examples([f"{error.path} ({error.reason})" for error in bad], 5)
    text = (
        f"{len(bad)} of {len(paths)} pictures cannot be decoded: {named}; copy them again, or "
        "leave them out with CACHE.SKIP_BAD True (--skip-bad)"
    )
    return [Problem("bad-images", text, "error")]


def _open(path: str) -> BadImage | None:
    try:
        read_rgb(path)
    except BadImage as error:
        return error
    return None
