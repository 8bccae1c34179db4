"""CUHK03 as the new protocol's list and the pictures it names, extracted or in ``cuhk-03.mat``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data import problems as wrong
from data.datasets.base import LoadedData, LoadRequest, subject_of
from data.datasets.cuhk03_protocol import Protocol, config_name, read_protocol
from data.datasets.cuhk03_raw import cache_folder, extract, list_names
from data.datasets.locate import search_below
from data.datasets.market_style import split_of
from data.datasets.naming import list_images
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

TITLE = "CUHK03"
KINDS = ("labeled", "detected")
# Pictures each kind has in all, train and test.
_LISTED = {"labeled": 14_096, "detected": 14_097}


@dataclass(frozen=True)
class Sources:
    """What a folder has of one kind."""

    home: Path
    kind: str
    images: Path | None
    mat: Path | None
    config: Path | None

    @classmethod
    def find(cls, home: Path, kind: str) -> Sources:
        """Look in and below a folder."""
        return cls(
            home,
            kind,
            find_part(home, f"images_{kind}"),
            find_part(home, "cuhk-03.mat"),
            find_part(home, config_name(kind)),
        )


def find_part(home: Path, name: str) -> Path | None:
    """First file or folder of a name in ``home`` or up to two levels below."""
    folder = search_below(home, lambda f: (f / name).exists(), 2)
    return folder / name if folder else None


def load_listed(sources: Sources, request: LoadRequest) -> LoadedData:
    """Load by the protocol's list, extracting the pictures once if need be.

    Raises:
        DatasetError: The list is missing, broken, or not that of the pictures.
    """
    kind = sources.kind
    if sources.config is None:
        raise _no_config(sources)
    protocol = read_protocol(sources.config)
    images, files, layout = _pictures(sources, request)
    problems = _check_kind(protocol, files, images, kind, sources.config)
    names: dict[str, str] = {}
    parts = {
        subset: _samples(protocol, subset, files, request.base_name, names)
        for subset in ("train", "query", "gallery")
    }
    splits = DatasetSplits(
        request.name, train=parts["train"], query=parts["query"], gallery=parts["gallery"]
    )
    return LoadedData(splits, TITLE, layout, images.parent, {}, problems, names)


def _pictures(sources: Sources, request: LoadRequest) -> tuple[Path, dict[str, Path], str]:
    """Find or extract the pictures; returns their folder, their paths by stem, and the layout."""
    layout = "extracted images with the new protocol's config"
    images = sources.images
    if images is None:
        if sources.mat is None:
            raise AssertionError("a source has extracted images or a .mat")
        layout = "cuhk-03.mat with the new protocol's config"
        beside = cache_folder(sources.mat, sources.kind, sources.home)
        images = request.extract_to or beside
        if request.list_only and not images.is_dir():
            names = list_names(sources.mat, sources.kind)
            return images, {Path(name).stem: images / name for name in names}, layout
        extract(sources.mat, sources.kind, images)
    return images, {path.stem: path for path in list_images(images)}, layout


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
            f"({wrong.examples(missing)}); extract them again, both being the {kind} ones",
        )
    if extra:
        text = f"{len(extra)} pictures in {images} are in no list ({wrong.examples(extra)})"
        return (Problem("unlisted-images", text, "note"),)
    return ()


def _no_config(sources: Sources) -> DatasetError:
    kind = sources.kind
    other = next(k for k in KINDS if k != kind)
    stray = find_part(sources.home, config_name(other))
    images = sources.images or sources.mat
    if stray is not None:
        return wrong.kind_mismatch(stray, images, kind, other, None)
    return DatasetError(
        "no-protocol",
        f"{images} has no new protocol beside it: put {config_name(kind)} into {sources.home}",
    )
