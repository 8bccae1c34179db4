"""MSMT17: V1, V2 and Market-style copies, protocols, lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.datasets.layout import LoadRequest
from data.problems import DatasetError
from data.records import DatasetSplits
from data.registry import load_data, load_splits
from tests.fixtures import trees


def who(splits: DatasetSplits) -> dict[str, list[tuple[int, int, str]]]:
    return {
        name: [(s.pid, s.camid, s.subject) for s in getattr(splits, name)]
        for name in ("train", "query", "gallery")
    }


LAYOUTS = {
    "V1": lambda root: trees.msmt17(root),
    "V2": trees.msmt17_v2,
    "below": lambda root: trees.msmt17(root, "msmt17/MSMT17_V1"),
    "flattened": lambda root: trees.msmt17(root, "MSMT17"),
    "nested": lambda root: trees.msmt17(root, "MSMT17_V1/MSMT17_V1/MSMT17_V1"),
    "V2 below": lambda root: trees.msmt17(
        root, "msmt17/MSMT17_V2", ("mask_train_v2", "mask_test_v2")
    ),
    "Market-style": trees.msmt17_market_style,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_people(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path / "a")
    trees.msmt17(tmp_path / "b")
    found, expected = (who(load_splits("msmt17", tmp_path / x)) for x in "ab")
    assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in expected.items()}


def test_cameras_of_two_digits_and_test_subjects(tmp_path: Path) -> None:
    trees.msmt17(tmp_path)
    splits = load_splits("msmt17", tmp_path)
    assert {s.camid for s in splits.train} == {0, 3, 9}
    assert {s.camid for s in splits.gallery} == {10, 13}
    assert splits.train[0].subject == "msmt17/train/0"  # pids restart: another person
    assert splits.query[0].subject == splits.gallery[0].subject == "msmt17/test/0"


def test_trainval_adds_the_validation_list(tmp_path: Path) -> None:
    trees.msmt17(tmp_path)
    train = load_splits("msmt17", tmp_path)
    both = load_splits("msmt17", tmp_path, msmt17_protocol="trainval")
    assert (len(train.train), len(both.train)) == (18, 24)
    assert "trainval" in both.notes["protocol"]
    with pytest.raises(DatasetError, match="MSMT17.PROTOCOL is 'val'; expected train or trainval"):
        load_splits("msmt17", tmp_path, msmt17_protocol="val")


def test_the_protocol_of_a_market_style_copy(tmp_path: Path) -> None:
    trees.msmt17_market_style(tmp_path)
    loaded = load_data(LoadRequest("msmt17", tmp_path, msmt17_protocol="trainval"))
    assert "protocol-fixed" in {p.code for p in loaded.problems}
    assert "one-digit-camera" not in {p.code for p in loaded.problems}


def test_files_may_be_upper_case_where_lists_are_not(tmp_path: Path) -> None:
    folder = trees.msmt17(tmp_path)
    for person in sorted((folder / "train").iterdir()):
        trees.rename_all(person, ".jpg", ".JPG")
    loaded = load_data(LoadRequest("msmt17", tmp_path))
    assert loaded.splits.train[0].path.endswith(".JPG")
    assert "upper-case-suffix" in {p.code for p in loaded.problems}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0000/0000_001_01_0303noon_0008_0.jpg 0".encode("utf-16"),
            "list_train.txt is not UTF-8",
        ),
        ("0000/0000_001_0²_0303morning_0008_0.jpg 0".encode(), "list_train.txt line 1 is"),
        ("0000/0000_001_01_0303morning_0008_0.jpg ²".encode(), "list_train.txt line 1 is"),
    ],
)
def test_damaged_lists_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    trees.msmt17(tmp_path)
    (tmp_path / "MSMT17_V1" / "list_train.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_splits("msmt17", tmp_path)


def test_lists_of_windows_are_read(tmp_path: Path) -> None:
    trees.msmt17(tmp_path)
    expected = who(load_splits("msmt17", tmp_path))
    for path in (tmp_path / "MSMT17_V1").glob("list_*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert who(load_splits("msmt17", tmp_path)) == expected


def test_nested_v2_with_macos_litter_and_windows_lists(tmp_path: Path) -> None:
    trees.msmt17(tmp_path / "plain")
    folders = ("mask_train_v2", "mask_test_v2")
    folder = trees.msmt17(tmp_path / "D", "MSMT17_V2/MSMT17_V2", folders)
    litter = tmp_path / "D" / "__MACOSX" / "MSMT17_V2" / "mask_train_v2" / "0000"
    litter.mkdir(parents=True)
    (litter / "._0000_000_01_0303morning_0000_0.jpg").write_bytes(b"resource fork")
    (folder / folders[0] / "0000" / "._0000_000_01_0303morning_0000_0.jpg").write_bytes(b"fork")
    for path in folder.glob("list_*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert who(load_splits("msmt17", tmp_path / "D")) == who(
        load_splits("msmt17", tmp_path / "plain")
    )
