"""Market-1501: folder names, junk and distractors, labels, subjects, file names."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.datasets.layout import LoadRequest, parse_market_name, pid_of_text
from data.records import DatasetSplits
from data.registry import load_data, load_splits
from tests.fixtures import trees

ROOTS = [
    "market1501",
    "market1501/Market-1501-v15.09.15",
    "Market-1501-v15.09.15",
    "Market",
    "market1501/market1501",
]


def facts(splits: DatasetSplits) -> dict[str, list[tuple[str, int, int, str]]]:
    return {
        name: [(Path(s.path).name, s.pid, s.camid, s.subject) for s in getattr(splits, name)]
        for name in ("train", "query", "gallery")
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> DatasetSplits:
    root = tmp_path_factory.mktemp("market")
    trees.market1501(root)
    return load_splits("market1501", root)


@pytest.mark.parametrize("home", ROOTS)
def test_every_folder_name_gives_the_same_samples(
    tmp_path: Path, home: str, plain: DatasetSplits
) -> None:
    trees.market1501(tmp_path, home)
    assert facts(load_splits("market1501", str(tmp_path))) == facts(plain)


def test_junk_is_dropped_and_distractors_stay(plain: DatasetSplits) -> None:
    assert {s.pid for s in plain.gallery} == {0, *trees.MARKET_TEST}
    assert len(plain.gallery) == 4 * 3 * 2 + 3
    assert {s.camid for s in plain.train} == {0, 1, 2}
    assert not plain.has_validation


def test_labels_are_the_sorted_pids(plain: DatasetSplits) -> None:
    assert plain.label_of == {pid: i for i, pid in enumerate(sorted(trees.MARKET_TRAIN))}


def test_subjects_name_dataset_split_and_person(plain: DatasetSplits) -> None:
    assert plain.train[0].subject == "market1501/train/2"
    assert plain.query[0].subject == plain.gallery[3].subject == "market1501/test/1"


def test_a_parent_folder_does_not_decide_the_camera(tmp_path: Path, plain: DatasetSplits) -> None:
    trees.market1501(tmp_path / "exp01_c9_x")
    assert facts(load_splits("market1501", tmp_path / "exp01_c9_x")) == facts(plain)


def test_upper_case_suffixes_are_read_and_reported(tmp_path: Path, plain: DatasetSplits) -> None:
    trees.rename_all(trees.market1501(tmp_path) / "query", ".jpg", ".JPG")
    loaded = load_data(LoadRequest("market1501", tmp_path))
    assert len(loaded.splits.query) == len(plain.query)
    assert [p.level for p in loaded.problems if p.code == "upper-case-suffix"] == ["note"]


def test_double_suffixes_are_read(tmp_path: Path, plain: DatasetSplits) -> None:
    trees.rename_all(trees.market1501(tmp_path) / "bounding_box_test", ".jpg", ".jpg.jpg")
    assert len(load_splits("market1501", tmp_path).gallery) == len(plain.gallery)


def test_banner_and_counts_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trees.market1501(tmp_path)
    with caplog.at_level(logging.INFO, "reid_baseline"):
        load_splits("market1501", tmp_path)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "=> Market1501 loaded"
    table = "\n".join(" ".join(line.split()) for line in lines)
    assert "subset | # ids | # images | # cameras" in table
    assert "train | 10 | 60 | 3" in table
    warned = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert any("train: found 10 ids" in w and "expected 751 ids / 12,936" in w for w in warned)


@given(
    pid=st.integers(-1, 99999),
    camera=st.integers(1, 999),
    sequence=st.one_of(st.none(), st.integers(1, 9)),
    suffix=st.sampled_from([".jpg", ".png", ".JPG", ".jpg.jpg"]),
    folder=st.sampled_from(["", "exp01_c9_x/", "0007_c5_/"]),
)
def test_names_parse_back(
    pid: int, camera: int, sequence: int | None, suffix: str, folder: str
) -> None:
    number = "-1" if pid < 0 else f"{pid:04d}"
    name = f"{number}_c{camera}{'' if sequence is None else f's{sequence}'}_000151_01{suffix}"
    assert parse_market_name(folder + name) == (pid, camera)


@pytest.mark.parametrize("name", ["0001.jpg", "0001_c.jpg", "a_c1_1.jpg", "0001_s1_c1_1.jpg", ""])
def test_other_names_do_not_parse(name: str) -> None:
    assert parse_market_name(name) is None


@given(st.text(min_size=1))
def test_any_identity_becomes_a_stable_int64(text: str) -> None:
    pid = pid_of_text(text)
    assert pid == pid_of_text(text)
    if not text.strip().lstrip("-").isdigit():
        assert 2**32 <= pid < 2**63
