"""CUHK03: every layout gives the same samples; extraction, protocol and optional readers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from data.datasets import cuhk03_raw
from data.datasets.cuhk03_raw import read_protocol
from data.datasets.layout import LoadRequest
from data.images import read_rgb
from data.problems import DatasetError
from data.records import DatasetSplits
from data.registry import load_data, load_splits
from tests.fixtures import trees
from tests.fixtures.paths import SHARED_DATA

ROUTES = {
    "raw, release": lambda root, kind: trees.cuhk03_raw(root),
    "raw": lambda root, kind: trees.cuhk03_raw(root, release=False),
    "extracted": trees.cuhk03_extracted,
    "NP": lambda root, kind: trees.cuhk03_np(root, kind, f"CUHK03-NP/{kind}"),
    "NP flat": lambda root, kind: trees.cuhk03_np(root, kind, "cuhk03"),
    "NP nested": lambda root, kind: trees.cuhk03_np(root, kind, f"cuhk03-np/cuhk03-np/{kind}"),
}


def everything(splits: DatasetSplits) -> dict[str, list[tuple[int, int, str, bytes]]]:
    return {
        name: [
            (s.pid, s.camid, s.subject, np.asarray(read_rgb(s.path)).tobytes())
            for s in getattr(splits, name)
        ]
        for name in ("train", "query", "gallery")
    }


@pytest.mark.parametrize("kind", ["labeled", "detected"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_layout_gives_the_same_people_cameras_and_pixels(
    tmp_path: Path, route: str, kind: str
) -> None:
    ROUTES[route](tmp_path, kind)
    found = everything(load_splits("cuhk03", tmp_path, cuhk03_kind=kind))
    rows = trees._cuhk_list(kind)
    for part, indices in trees.cuhk03_indices(kind).items():
        split = "train" if part == "train" else "test"
        assert found[part] == [
            (pid, camera - 1, f"cuhk03/{split}/{pid}", values.tobytes())
            for _, pid, camera, values in (rows[index - 1] for index in indices)
        ]


def test_the_original_is_extracted_once_to_the_usual_folder(tmp_path: Path) -> None:
    folder = trees.cuhk03_raw(tmp_path)
    first = load_splits("cuhk03", tmp_path)
    images = folder / "images_labeled"
    assert len(list(images.iterdir())) == len(trees.cuhk_cells("labeled"))
    (folder / "cuhk03_release" / "cuhk-03.mat").unlink()  # no longer needed
    assert load_splits("cuhk03", tmp_path) == first


def test_interrupted_extraction_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trees.cuhk03_raw(tmp_path)
    images = cuhk03_raw.iterate_images

    def broken(*args: object) -> object:
        for number, item in enumerate(images(*args)):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(cuhk03_raw, "iterate_images", broken)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        load_splits("cuhk03", tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_read_only_data_is_extracted_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trees.cuhk03_raw(tmp_path / "data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    splits = load_splits("cuhk03", tmp_path / "data")
    assert splits.train[0].path.startswith(str(tmp_path / "cache"))
    assert not (folder / "images_labeled").exists()


def test_list_only_extracts_nothing(tmp_path: Path) -> None:
    folder = trees.cuhk03_raw(tmp_path)
    loaded = load_data(LoadRequest("cuhk03", tmp_path, list_only=True))
    assert not (folder / "images_labeled").exists()
    assert loaded.splits == load_splits("cuhk03", tmp_path)


def test_indices_of_the_protocol_start_at_zero_without_overflow(tmp_path: Path) -> None:
    protocol = read_protocol(trees.cuhk03_config(tmp_path, "labeled"))
    assert protocol.subsets["train"].min() == 0
    assert protocol.subsets["train"].dtype == np.int64


def test_the_message_for_a_missing_reader_contains_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.cuhk03_raw(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DatasetError, match="pip install h5py") as caught:
        load_splits("cuhk03", tmp_path)
    assert caught.value.problem.code == "missing-h5py"


@pytest.mark.data
def test_camera_pair_1_is_not_a_broken_protocol() -> None:
    loaded = load_data(LoadRequest("cuhk03", SHARED_DATA))
    assert loaded.problems == ()
    assert loaded.splits.notes["protocol"].startswith("CUHK03, camera pair 1")
    assert len(loaded.splits.train) == 6228
