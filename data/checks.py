"""Checks of data sets without training, and contact sheets: ``tools/data.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from data.datasets import cuhk03
from data.datasets.layout import SUBSETS, Counts, LoadedData, LoadRequest, list_folders
from data.datasets.market1501 import read_validation_tree
from data.images import BadImage, read_rgb
from data.problems import DatasetError, Problem, copy_problems, examples, positive_problems
from data.records import DatasetSplits, Sample
from data.registry import DATASETS, load_data
from data.samplers import IdentitySampler
from data.store import undecodable
from utils.errors import UserError, naming_keys

_ABSENT = ("not-found", "kind-absent")
_TILE = (64, 128)  # width and height of an image on a contact sheet, px


@dataclass(frozen=True)
class CheckOptions:
    """The settings that a data set is checked for."""

    msmt17_protocol: str = "train"  # ``train`` or ``trainval``
    cuhk03_kind: str = ""  # ``labeled`` or ``detected``; '': every kind that is present
    cross_camera: bool = True  # TEST.CROSS_CAMERA
    batch_size: int = 80  # SOLVER.IMS_PER_BATCH
    num_instances: int = 4  # DATALOADER.NUM_INSTANCE
    open_images: bool = False  # whether to decode every image
    skip_bad: bool = False  # CACHE.SKIP_BAD: images that cannot be decoded are only a warning


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


def check_root(root: Path, options: CheckOptions) -> list[DataReport]:
    """Check every data set below a folder; nothing is written.

    Raises:
        DatasetError: No data set was found; the text contains what was searched for.
    """
    reports: list[DataReport] = []
    elsewhere: list[DatasetError] = []
    absent: list[str] = []
    names = [n for n in DATASETS if not n.endswith("_val") or (root / n).is_dir()]
    for request in (r for n in names if n != "synthetic" for r in requests(n, root, options)):
        try:
            reports.append(_loaded(request, options))
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
    for request in requests(name, root, options):
        try:
            reports.append(_loaded(request, options))
        except DatasetError as error:
            reports.append(_unusable(request.name, error.problem))
    return reports


def _unusable(name: str, problem: Problem) -> DataReport:
    return DataReport(name, name, problems=(problem,))


def _loaded(request: LoadRequest, options: CheckOptions) -> DataReport:
    return _described(load_data(request, compare_images=True), options)


def requests(name: str, root: Path, options: CheckOptions) -> list[LoadRequest]:
    """Return the requests for a name: a folder may contain both kinds of CUHK03.

    A validation split is read with the protocol and the kind that it was made with.
    """
    protocol = "" if name.endswith("_val") else options.msmt17_protocol
    request = LoadRequest(name, root, protocol, "", list_only=True)
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
                reports.append(_described(loaded, options))
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


def _described(loaded: LoadedData, options: CheckOptions) -> DataReport:
    splits = loaded.splits
    problems = [*loaded.problems, *_fit_problems(splits, options)]
    if options.open_images:
        problems += _bad_images(splits, options)
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


def _bad_images(splits: DatasetSplits, options: CheckOptions) -> list[Problem]:
    """Decode every image; return a problem that names those that cannot be decoded."""
    paths = sorted({s.path for subset in SUBSETS for s in getattr(splits, subset)})
    bad = undecodable(paths)
    if not bad:
        return []
    named = examples([f"{error.path} ({error.reason})" for error in bad], 5)
    text = (
        f"{len(bad)} of {len(paths)} images cannot be decoded: {named}; copy them again, or "
        "leave them out with CACHE.SKIP_BAD True (--skip-bad)"
    )
    return [Problem("bad-images", text, "warning" if options.skip_bad else "error")]


@dataclass(frozen=True)
class ContactSheet:
    """Images of a data set, with one identity in each row and one camera in each column."""

    image: Image.Image
    pids: tuple[int, ...]  # identities of the rows
    camids: tuple[int, ...]  # cameras of the columns, from 0
    bad: tuple[BadImage, ...]  # images that cannot be decoded


def contact_sheet(
    samples: Sequence[Sample], *, people: int, cameras: int, names: Mapping[int, str] | None = None
) -> ContactSheet:
    """Draw a contact sheet (RGB), for example docs/images/synthetic.png.

    It has at most ``people`` rows, sorted by pid, or by name for people with names, and at most
    ``cameras`` columns, lowest number first. The first path of each identity and camera is drawn. A
    tile without an image is grey; one whose image cannot be decoded is black.
    """
    chosen: dict[tuple[int, int], Sample] = {}
    for sample in sorted(samples, key=lambda sample: sample.path):
        chosen.setdefault((sample.pid, sample.camid), sample)
    names = names or {}
    pids = sorted({pid for pid, _ in chosen}, key=lambda pid: (names.get(pid, ""), pid))[:people]
    camids = sorted({camid for pid, camid in chosen if pid in pids})[:cameras]
    (width, height), gap = _TILE, 2  # px; white pixels between images
    size = (len(camids) * (width + gap) - gap, len(pids) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    bad: list[BadImage] = []
    for row, pid in enumerate(pids):
        for column, camid in enumerate(camids):
            image = Image.new("RGB", _TILE, (128, 128, 128))
            if (pid, camid) in chosen:
                try:
                    image = read_rgb(chosen[pid, camid].path).resize(_TILE)
                except BadImage as error:
                    bad.append(error)
                    image = Image.new("RGB", _TILE, "black")
            sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return ContactSheet(sheet, tuple(pids), tuple(camids), tuple(bad))
