"""CUHK03 in the new protocol: 1,467 identities, 767 to train and 700 to test, two cameras each.

It exists as the original ``cuhk-03.mat``, as extracted images, and as CUHK03-NP folders. All give
the same identities, cameras and pixels, in the same order.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from data import problems as wrong
from data.datasets.cuhk03_raw import (
    Protocol,
    cache_folder,
    config_name,
    extract,
    list_names,
    read_protocol,
)
from data.datasets.layout import (
    Counts,
    LoadedData,
    LoadRequest,
    Origin,
    has_folders,
    list_images,
    named_children,
    not_found,
    search_below,
    split_of,
    subject_of,
)
from data.datasets.market1501 import FOLDERS, TEST_FOLDERS, missing_folders, read_market_tree
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

TITLE = "CUHK03"
KINDS = ("labeled", "detected")
_SUBSETS = ("train", "query", "gallery")
# Number of images of each kind, of all subsets.
_LISTED = {"labeled": 14_096, "detected": 14_097}
ROOTS = ("cuhk03", "cuhk03-np", "cuhk-03")
ORIGIN = Origin(
    TITLE,
    ROOTS,
    f"{', '.join(FOLDERS)}, or images_KIND/ or cuhk-03.mat with {config_name('KIND')}",
    "https://www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html",
)
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
# The first of the five camera pairs in NP folders: complete, but not a published protocol.
CAMERA_PAIR_1 = {
    "train": Counts(643, 6_228, 2),
    "query": Counts(200, 400, 2),
    "gallery": Counts(200, 1_549, 2),
}


def load(request: LoadRequest) -> LoadedData:
    """Load ``cuhk03``: the whole training set, without a validation split.

    Raises:
        DatasetError: It was not found, or is not complete.
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
            has_kinds = has_folders(folder / kind, TEST_FOLDERS)
            return _described(_load_np(folder / kind if has_kinds else folder, request), request)
    for home in homes:
        sources = _Sources(home, kind)
        if sources.images or sources.mat:
            return _described(_load_listed(sources, request), request)
    for home in homes:
        _explain_incomplete(home, kind)
    raise not_found(request.root, ORIGIN, _is_any)


def kinds_present(root: Path) -> tuple[str, ...]:
    """Return the kinds of box in a root; the default kind if the folder names have none."""
    kinds = tuple(
        kind for kind in KINDS if any(_has(home, kind) for home in named_children(root, ROOTS))
    )
    return kinds or KINDS[:1]


def _has(home: Path, kind: str) -> bool:
    """Return whether a folder has images of a kind, or the original with the list of the kind."""
    if _find_part(home, f"images_{kind}") or _find_part(home, f"{kind}/query"):
        return True
    return bool(_find_part(home, "cuhk-03.mat") and _find_part(home, config_name(kind)))


def _is_np(folder: Path, kind: str) -> bool:
    others = set(KINDS) - {kind}
    here = has_folders(folder, TEST_FOLDERS) and folder.name.lower() not in others
    return here or has_folders(folder / kind, TEST_FOLDERS)


def _is_any(folder: Path) -> bool:
    parts = [*FOLDERS, "images_labeled", "images_detected", "cuhk03_release", "cuhk-03.mat"]
    parts += [f"{kind}/{name}" for kind in KINDS for name in FOLDERS]
    return any((folder / part).exists() for part in parts)


def _load_np(folder: Path, request: LoadRequest) -> LoadedData:
    splits, problems = read_market_tree(folder, request.base_name)
    parts = {subset: tuple(sorted(getattr(splits, subset), key=_list_order)) for subset in _SUBSETS}
    splits = DatasetSplits(splits.name, **parts, notes=splits.notes)
    return LoadedData(splits, TITLE, "CUHK03-NP folders", folder, {}, problems)


def _list_order(sample: Sample) -> tuple[int, int, int, str]:
    """Return the sort key: person, camera, index in the file list. It is equal for all layouts."""
    name = Path(sample.path).name
    number = re.search(r"_(\d+)\.", name)
    return sample.pid, sample.camid, int(number[1]) if number else 0, name


def _described(loaded: LoadedData, request: LoadRequest) -> LoadedData:
    """Add the protocol and the published size."""
    kind = request.cuhk03_kind
    splits = loaded.splits
    counts = {subset: Counts.of(getattr(splits, subset)) for subset in _SUBSETS}
    notes = {"protocol": f"CUHK03 new protocol, {kind}"}
    expected = EXPECTED[kind]
    if counts == CAMERA_PAIR_1:
        notes = {"protocol": "CUHK03, camera pair 1 (not a published protocol)"}
        expected = CAMERA_PAIR_1
    other = next(k for k in KINDS if k != kind)
    if counts == EXPECTED[other]:
        text = (
            f"{loaded.folder} contains the {other} boxes, but CUHK03.KIND is {kind}; "
            f"set CUHK03.KIND {other}, or copy the {kind} boxes there"
        )
        raise DatasetError("kind-mismatch", text)
    splits = replace(splits, notes=notes)
    return replace(loaded, splits=splits, expected=expected)


def _explain_incomplete(home: Path, kind: str) -> None:
    """Raise the error for a CUHK03 folder from which nothing could be loaded."""
    other = next(k for k in KINDS if k != kind)
    has_other = search_below(home, lambda f: _is_np(f, other), 2) or _find_part(
        home, f"images_{other}"
    )
    if has_other is not None:
        config = _find_part(home, config_name(kind))
        if config is not None and _find_part(home, config_name(other)) is None:
            raise _kind_mismatch(config, _find_part(home, f"images_{other}"), other, kind, None)
        raise DatasetError(
            "kind-absent",
            f"CUHK03.KIND is {kind}, but {home} only has the {other} boxes; set "
            f"CUHK03.KIND {other}, or copy the {kind} boxes there",
        )
    partial = search_below(home, lambda f: any((f / name).is_dir() for name in FOLDERS), 2)
    if partial is not None:
        raise missing_folders(partial, TITLE)


class _Sources:
    """The files of one kind of box in or below a folder; None for those that are missing."""

    def __init__(self, home: Path, kind: str) -> None:
        self.home, self.kind = home, kind
        self.images = _find_part(home, f"images_{kind}")
        self.mat = _find_part(home, "cuhk-03.mat")
        self.config = _find_part(home, config_name(kind))


def _find_part(home: Path, name: str) -> Path | None:
    """Return the first file or folder of a name in ``home`` or up to two levels below."""
    folder = search_below(home, lambda f: (f / name).exists(), 2)
    return folder / name if folder else None


def _load_listed(sources: _Sources, request: LoadRequest) -> LoadedData:
    """Load by the protocol's list; images in a .mat file are extracted once."""
    kind = sources.kind
    if sources.config is None:
        raise _no_config(sources)
    protocol = read_protocol(sources.config)
    images, files, layout = _images(sources, request)
    problems = _check_kind(protocol, files, images, kind, sources.config)
    names: dict[str, str] = {}
    parts = {
        subset: _samples(protocol, subset, files, request.base_name, names) for subset in _SUBSETS
    }
    splits = DatasetSplits(request.name, **parts, notes={})
    return LoadedData(splits, TITLE, layout, images.parent, {}, problems, names)


def _images(sources: _Sources, request: LoadRequest) -> tuple[Path, dict[str, Path], str]:
    """Find or extract the images; return their folder, their paths by stem, and the layout."""
    layout = "extracted images with the new protocol's config"
    images = sources.images
    if images is None:
        assert sources.mat is not None  # noqa: S101 - checked by ``load``
        layout = "cuhk-03.mat with the new protocol's config"
        usual = cache_folder(sources.mat, sources.kind, sources.home)
        images = request.extract_to or usual
        if request.list_only and not images.is_dir():
            names = list_names(sources.mat, sources.kind)
            return images, {Path(name).stem: images / name for name in names}, layout
        extract(sources.mat, sources.kind, images)
    return images, {path.stem: path for path in list_images(images)}, layout


def _samples(
    protocol: Protocol, subset: str, files: dict[str, Path], dataset: str, names: dict[str, str]
) -> tuple[Sample, ...]:
    """Return the samples of a subset; add the name of each image in CUHK03-NP to ``names``."""
    keyed = []
    for index in protocol.subsets[subset]:
        path = files[Path(protocol.names[index]).stem]
        pid, camera = int(protocol.labels[index]), int(protocol.cameras[index])
        sample = Sample(str(path), pid, camera - 1, subject_of(dataset, split_of(subset), pid))
        names[sample.path] = f"{pid:04d}_c{camera}_{index + 1}{path.suffix.lower()}"
        keyed.append(((pid, camera, int(index)), sample))
    return tuple(sample for _, sample in sorted(keyed, key=lambda item: item[0]))


def _check_kind(
    protocol: Protocol, files: dict[str, Path], images: Path, kind: str, config: Path
) -> tuple[Problem, ...]:
    """Check that list and images are of one kind; boxes of the two kinds have the same names."""
    other = next(k for k in KINDS if k != kind)
    listed = {Path(name).stem for name in protocol.names}
    missing, extra = sorted(listed - files.keys()), sorted(files.keys() - listed)
    swapped = len(listed) != len(files) and _LISTED[other] in (len(listed), len(files))
    if swapped or (missing and extra):
        raise _kind_mismatch(config, images, kind, other, (missing or extra)[0])
    if missing:
        raise DatasetError(
            "images-missing",
            f"{len(missing)} of the {len(listed)} images listed in {config} are not in {images} "
            f"({wrong.examples(missing)}); extract the {kind} images again",
        )
    if extra:
        text = f"{len(extra)} images in {images} are not in the list ({wrong.examples(extra)})"
        return (Problem("unlisted-images", text, "note"),)
    return ()


def _no_config(sources: _Sources) -> DatasetError:
    kind = sources.kind
    other = next(k for k in KINDS if k != kind)
    stray = _find_part(sources.home, config_name(other))
    images = sources.images or sources.mat
    if stray is not None:
        return _kind_mismatch(stray, images, kind, other, None)
    return DatasetError(
        "no-protocol",
        f"{images} lacks the new protocol: copy {config_name(kind)} to {sources.home}",
    )


def _kind_mismatch(
    config: Path, images: Path | None, kind: str, other: str, example: str | None
) -> DatasetError:
    """Return the error for CUHK03's protocol of one kind of box with images of the other kind."""
    evidence = f" ({example} is only in one of them)" if example else ""
    return DatasetError(
        "kind-mismatch",
        f"{config} and {images} do not belong together{evidence}: protocol and images must both "
        f"be {kind} or both be {other}; copy the matching file, or set CUHK03.KIND",
    )
