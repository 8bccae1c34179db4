"""What every loader takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data.problems import Problem
from data.records import DatasetSplits, Sample


@dataclass(frozen=True)
class LoadRequest:
    """What is asked of a loader.

    Attributes:
        name: As asked for, such as ``market1501_val`` or ``folder:PATH``.
        root: Folder that holds the data sets.
        msmt17_protocol: Train on list_train (``train``) or also on list_val (``trainval``).
        cuhk03_kind: Boxes drawn by hand (``labeled``) or found by a detector (``detected``).
        synthetic_options: Keyword arguments of the synthetic set.
        extract_to: Folder for pictures taken out of CUHK03's .mat file; ``None`` puts them where
            everybody has them, ``cuhk03/images_<kind>``.
        list_only: Look, but extract nothing: paths of such pictures may not exist yet.
    """

    name: str
    root: Path
    msmt17_protocol: str = "train"
    cuhk03_kind: str = "labeled"
    synthetic_options: Mapping[str, int] = field(default_factory=dict)
    extract_to: Path | None = None
    list_only: bool = False

    @property
    def base_name(self) -> str:
        """Name without ``_val``: a split does not change whom a key belongs to."""
        return self.name.removesuffix("_val")


@dataclass(frozen=True)
class Counts:
    """Size of one subset."""

    ids: int
    images: int
    cameras: int

    @classmethod
    def of(cls, samples: tuple[Sample, ...]) -> Counts:
        """Count a subset."""
        return cls(len({s.pid for s in samples}), len(samples), len({s.camid for s in samples}))

    def __str__(self) -> str:
        """Show the three numbers in words."""
        return f"{self.ids:,} ids / {self.images:,} images / {self.cameras} cameras"


@dataclass(frozen=True)
class LoadedData:
    """What a loader found.

    Attributes:
        splits: The samples.
        title: Name for people, such as ``Market1501``.
        layout: Which of the known layouts it is.
        folder: Where it lies.
        expected: Published size per subset; empty where there is none to hold it against.
        problems: What was found wrong but can be lived with.
        market_names: Market-style name by path, for pictures whose own name is none.
    """

    splits: DatasetSplits
    title: str
    layout: str
    folder: Path
    expected: Mapping[str, Counts] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    market_names: Mapping[str, str] = field(default_factory=dict)

    def with_problems(self, *problems: Problem) -> LoadedData:
        """Return the same with more problems."""
        return replace(self, problems=(*self.problems, *problems))


Loader = Callable[[LoadRequest], LoadedData]

SUBSETS = ("train", "val_query", "val_gallery", "query", "gallery")


def subject_of(dataset: str, split: str, pid: int) -> str:
    """Label a person is encrypted under; ``split`` is ``train`` (with validation) or ``test``."""
    return f"{dataset}/{split}/{pid}"
