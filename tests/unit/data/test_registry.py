"""Properties of every data set in the registry."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from data.datasets.layout import SUBSETS
from data.records import DatasetSplits
from data.registry import DATASETS, OWN_DATA, load_splits
from data.train_split import make_split
from tests.fixtures import trees

SMALL = {"identities": 2, "cameras": 2, "images": 2, "seed": 1}


@pytest.fixture(scope="module", params=[*DATASETS, *OWN_DATA])
def load(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], DatasetSplits]:
    """Return a function that loads one of the data sets from a small tree."""
    name: str = request.param
    base = name.removesuffix("_val")
    assert base in trees.TREES, f"no tree of {base}; add one to TREES in tests/fixtures/trees.py"
    root = tmp_path_factory.mktemp("sets")
    tree = trees.TREES[base](root)
    if name != base:
        make_split(root, base)
    given = f"{name}:{tree}" if name in OWN_DATA else name
    return partial(load_splits, given, root, synthetic_options=SMALL)


@pytest.fixture(scope="module")
def splits(load: Callable[[], DatasetSplits]) -> DatasetSplits:
    return load()


def test_train_query_and_gallery_are_not_empty(splits: DatasetSplits) -> None:
    assert splits.train
    assert splits.query
    assert splits.gallery
    assert {s.pid for s in splits.query} <= {s.pid for s in splits.gallery}
    assert splits.has_validation or not splits.name.endswith("_val")


@pytest.mark.parametrize("subset", SUBSETS)
def test_samples_are_files_with_numbers(splits: DatasetSplits, subset: str) -> None:
    samples = getattr(splits, subset)
    assert all(Path(s.path).is_file() for s in samples)
    assert len(set(samples)) == len(samples)
    assert all(s.pid >= 0 for s in samples)  # -1 is junk
    assert all(s.camid >= 0 for s in samples)


def test_the_order_does_not_depend_on_the_file_system(
    load: Callable[[], DatasetSplits], splits: DatasetSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir, listdir = os.scandir, os.listdir

    @contextlib.contextmanager
    def backwards(folder: str | Path) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(folder) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    assert load() == splits


def test_subjects_consist_of_data_set_split_and_person(splits: DatasetSplits) -> None:
    datasets = set()
    for subset in SUBSETS:
        side = "test" if subset in ("query", "gallery") else "train"
        for sample in getattr(splits, subset):
            dataset, *rest = sample.subject.split("/")
            assert rest == [side, str(sample.pid)]
            datasets.add(dataset)
    assert len(datasets) == 1
    assert "" not in datasets
