"""CUHK03 in the new protocol: 1,467 identities, 767 to train and 700 to test, two cameras each.

People have it as the original ``cuhk-03.mat``, as extracted pictures, or as CUHK03-NP folders. Every
route gives the same identities, cameras and pixels, in the same order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from data import problems as wrong
from data.datasets.base import Counts, LoadedData, LoadRequest, subject_of
from data.datasets.cuhk03_protocol import Protocol, config_name, read_protocol
from data.datasets.cuhk03_raw import cache_folder, extract
from data.datasets.locate import has_folders, named_children, not_found, search_below
from data.datasets.market_style import (
    FOLDERS,
    load_validation_tree,
    missing_folders,
    read_market_tree,
    split_of,
)
from data.datasets.naming import list_images
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

TITLE = "CUHK03"
ROOTS = ("cuhk03", "cuhk03-np", "cuhk-03")
KINDS = ("labeled", "detected")
EXPECTED = {
    "labeled": {
        "train": Counts(767, 7_368, 2),
        "query": Counts(700, 1_400, 2),
        "gallery": Counts(700, 5_328, 2),
    },
    "detected": {
        "train": Counts(767, 7_365, 2),
        "query": Counts(700, 1_400, 2),
        "gallery": Counts(700, 5_332, 2),
    },
}
# The first of the five camera pairs alone, in NP folders: complete in itself, but nobody's protocol.
CAMERA_PAIR_1 = {
    "train": Counts(643, 6_228, 2),
    "query": Counts(200, 400, 2),
    "gallery": Counts(200, 1_549, 2),
}
_LISTED = {"labeled": 14_096, "detected": 14_097}


def load(request: LoadRequest) -> LoadedData:
    """Load ``cuhk03``: the whole training set, no validation.

    Raises:
        DatasetError: It is not there, or not what it should be.
    """
    kind = request.cuhk03_kind
    if kind not in KINDS:
        raise DatasetError(
            "unknown-kind", f"CUHK03.KIND is {kind!r}; expected one of {', '.join(KINDS)}"
        )
    homes = named_children(request.root, ROOTS)
    for home in homes:
        folder = search_below(home, lambda f: _is_np(f, kind), 2)
        if folder is not None:
            return _load_np(_np_folder(folder, kind), request)
    for home in homes:
        sources = _Sources.find(home, kind)
        if sources.images or sources.mat:
            return _load_listed(sources, request)
    for home in homes:
        _explain_what_is_there(home, kind)
    needs = f"{', '.join(FOLDERS)}, or images_{kind}/ or cuhk-03.mat with {config_name(kind)}"
    raise not_found(request.root, TITLE, ROOTS, _is_any, needs)


def load_validation(request: LoadRequest) -> LoadedData:
    """Load ``cuhk03_val``, made by ``data/train_split.py``."""
    return load_validation_tree(request, TITLE)


def _is_np(folder: Path, kind: str) -> bool:
    others = set(KINDS) - {kind}
    here = has_folders(folder, FOLDERS) and folder.name.lower() not in others
    return here or has_folders(folder / kind, FOLDERS)


def _np_folder(folder: Path, kind: str) -> Path:
    return folder / kind if has_folders(folder / kind, FOLDERS) else folder


def _is_any(folder: Path) -> bool:
    parts = (*FOLDERS, "images_labeled", "images_detected", "cuhk03_release", "cuhk-03.mat")
    return any((folder / part).exists() for part in parts)


def _load_np(folder: Path, request: LoadRequest) -> LoadedData:
    splits, problems = read_market_tree(folder, request.base_name)
    splits = replace(
        splits,
        train=tuple(sorted(splits.train, key=_place)),
        query=tuple(sorted(splits.query, key=_place)),
        gallery=tuple(sorted(splits.gallery, key=_place)),
    )
    return _described(LoadedData(splits, TITLE, "CUHK03-NP folders", folder, {}, problems), request)


def _place(sample: Sample) -> tuple[int, int, int, str]:
    """Order by person, camera and place in the file list: the same whatever the route."""
    name = Path(sample.path).name
    number = re.search(r"_(\d+)\.", name)
    return sample.pid, sample.camid, int(number[1]) if number else 0, name


def _described(loaded: LoadedData, request: LoadRequest) -> LoadedData:
    """Say which protocol it is, and hold it against the published size."""
    kind = request.cuhk03_kind
    splits = loaded.splits
    found = {subset: Counts.of(getattr(splits, subset)) for subset in ("train", "query", "gallery")}
    notes = {"protocol": f"CUHK03 new protocol, {kind}"}
    expected = EXPECTED[kind]
    if found == CAMERA_PAIR_1:
        notes = {"protocol": "CUHK03, camera pair 1 (not a published protocol)"}
        expected = CAMERA_PAIR_1
    other = next(k for k in KINDS if k != kind)
    if found == EXPECTED[other]:
        text = (
            f"{loaded.folder} holds the {other} boxes while CUHK03.KIND is {kind}; "
            f"set CUHK03.KIND {other}, or bring the {kind} ones"
        )
        raise DatasetError("kind-mismatch", text)
    splits = replace(splits, notes=notes)
    return replace(loaded, splits=splits, expected=expected)


@dataclass(frozen=True)
class _Sources:
    """What a folder has of one kind."""

    home: Path
    kind: str
    images: Path | None
    mat: Path | None
    config: Path | None

    @classmethod
    def find(cls, home: Path, kind: str) -> _Sources:
        return cls(
            home,
            kind,
            _find(home, f"images_{kind}"),
            _find(home, "cuhk-03.mat"),
            _find(home, config_name(kind)),
        )


def _find(home: Path, name: str) -> Path | None:
    folder = search_below(home, lambda f: (f / name).exists(), 2)
    return folder / name if folder else None


def _load_listed(sources: _Sources, request: LoadRequest) -> LoadedData:
    kind = sources.kind
    if sources.config is None:
        raise _no_config(sources)
    protocol = read_protocol(sources.config)
    images = sources.images
    layout = "extracted images with the new protocol's config"
    if images is None:
        assert sources.mat is not None  # noqa: S101 - load() only comes here with one of the two
        target = request.extract_to or cache_folder(sources.mat, kind, sources.home)
        images = extract(sources.mat, kind, target)
        layout = "cuhk-03.mat with the new protocol's config"
    files = {path.stem: path for path in list_images(images)}
    problems = _check_kind(protocol, files, images, kind, sources.config)
    names: dict[str, str] = {}
    parts = {
        subset: _samples(protocol, subset, files, request.base_name, names)
        for subset in ("train", "query", "gallery")
    }
    splits = DatasetSplits(
        request.name, train=parts["train"], query=parts["query"], gallery=parts["gallery"]
    )
    loaded = LoadedData(splits, TITLE, layout, images.parent, {}, problems, names)
    return _described(loaded, request)


def _samples(
    protocol: Protocol, subset: str, files: dict[str, Path], dataset: str, names: dict[str, str]
) -> tuple[Sample, ...]:
    """Make the samples of a subset, and note the name each picture has in CUHK03-NP."""
    keyed = []
    for place in protocol.subsets[subset]:
        path = files[Path(protocol.names[place]).stem]
        pid, camera = int(protocol.labels[place]), int(protocol.cameras[place])
        sample = Sample(str(path), pid, camera - 1, subject_of(dataset, split_of(subset), pid))
        names[sample.path] = f"{pid:04d}_c{camera}_{place + 1}{path.suffix.lower()}"
        keyed.append(((pid, camera, int(place)), sample))
    return tuple(sample for _, sample in sorted(keyed, key=lambda item: item[0]))


def _check_kind(
    protocol: Protocol, files: dict[str, Path], images: Path, kind: str, config: Path
) -> tuple[Problem, ...]:
    """See that list and pictures belong together: boxes of the two kinds bear the same names."""
    other = next(k for k in KINDS if k != kind)
    listed = {Path(name).stem for name in protocol.names}
    missing, extra = sorted(listed - files.keys()), sorted(files.keys() - listed)
    swapped = len(listed) != len(files) and _LISTED[other] in (len(listed), len(files))
    if swapped or (missing and extra):
        raise wrong.kind_mismatch(config, images, kind, other, (missing or extra)[0])
    if missing:
        raise DatasetError(
            "images-missing",
            f"{len(missing)} of the {len(listed)} pictures listed in {config} are not in {images} "
            f"({wrong.examples(missing)}); extract them again, and see that both are the {kind} ones",
        )
    if extra:
        text = f"{len(extra)} pictures in {images} are in no list ({wrong.examples(extra)}) and left out"
        return (Problem("unlisted-images", text, "note"),)
    return ()


def _no_config(sources: _Sources) -> DatasetError:
    kind = sources.kind
    other = next(k for k in KINDS if k != kind)
    stray = _find(sources.home, config_name(other))
    images = sources.images or sources.mat
    if stray is not None:
        return wrong.kind_mismatch(stray, images, kind, other, None)
    return DatasetError(
        "no-protocol",
        f"{images} has no new protocol beside it: put {config_name(kind)} into {sources.home}",
    )


def _explain_what_is_there(home: Path, kind: str) -> None:
    """Raise what is known about a CUHK03 folder that nothing could be loaded from."""
    other = next(k for k in KINDS if k != kind)
    has_other = search_below(home, lambda f: _is_np(f, other), 2) or _find(home, f"images_{other}")
    if has_other is not None:
        config = _find(home, config_name(kind))
        if config is not None and _find(home, config_name(other)) is None:
            raise wrong.kind_mismatch(config, _find(home, f"images_{other}"), other, kind, None)
        raise DatasetError(
            "kind-absent",
            f"CUHK03.KIND is {kind}, but {home} only holds the {other} boxes; set CUHK03.KIND {other}, "
            f"or bring the {kind} ones",
        )
    partial = search_below(home, lambda f: any((f / name).is_dir() for name in FOLDERS), 2)
    if partial is not None:
        raise missing_folders(partial, TITLE)
