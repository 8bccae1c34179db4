from __future__ import annotations

from pathlib import Path

import pytest

from data.problems import DatasetError
from data.records import DatasetSplits
from data.registry import load_splits
from tests.fixtures import trees


def people(root: Path, cameras: int = 2, names: tuple[str, ...] = ()) -> Path:
    for pid in names or tuple(f"{n:03d}" for n in range(10)):
        for camera in range(cameras):
            for number in range(2):
                trees.save(root / pid / f"x_c{camera + 1}_{number}.png", pid, camera, number)
    return root


def test_market_style_folders(tmp_path: Path) -> None:
    folder = trees.market1501(tmp_path, "mine")
    splits = load_splits(f"folder:{folder}", tmp_path / "nowhere")
    assert (len(splits.train), len(splits.query)) == (60, 12)
    assert splits.train[0].subject == "mine/train/2"
    assert {s.pid for s in splits.gallery} == {0, 1, 3, 4, 5}


def test_a_relative_path_may_count_from_the_root(tmp_path: Path) -> None:
    trees.market1501(tmp_path, "mine")
    assert len(load_splits("folder:mine", tmp_path).train) == 60


def test_subsets_of_person_folders(tmp_path: Path) -> None:
    for subset in ("train", "query", "gallery", "val_query", "val_gallery"):
        people(tmp_path / subset, names=("alice", "7"))
    splits = load_splits(f"folder:{tmp_path}", tmp_path)
    assert splits.has_validation
    assert len(splits.label_of) == 2
    assert {s.camid for s in splits.train} == {1, 2}


def check_division(splits: DatasetSplits) -> None:
    groups = [{s.pid for s in part} for part in (splits.train, splits.val_query, splits.query)]
    assert all(groups)
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert {s.subject.split("/")[1] for s in splits.gallery} == {"test"}
    assert {s.subject.split("/")[1] for s in (*splits.train, *splits.val_gallery)} == {"train"}


def test_persons_alone_are_divided_always_alike(tmp_path: Path) -> None:
    name = f"folder:{people(tmp_path)}"
    splits = load_splits(name, tmp_path)
    check_division(splits)
    assert splits == load_splits(name, tmp_path)
    total = [*splits.train, *splits.query, *splits.gallery, *splits.val_query, *splits.val_gallery]
    assert len(total) == len(set(total)) == 40


def test_a_single_camera_can_be_divided(tmp_path: Path) -> None:
    splits = load_splits(f"folder:{people(tmp_path, cameras=1)}", tmp_path)
    check_division(splits)
    assert {s.pid for s in splits.query} <= {s.pid for s in splits.gallery}


def test_too_few_persons(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="three are needed"):
        load_splits(f"folder:{people(tmp_path, names=('a', 'b'))}", tmp_path)


def test_the_same_person_twice(tmp_path: Path) -> None:
    people(tmp_path, names=("1", "01", "2", "3"))
    with pytest.raises(DatasetError, match="same identity 1"):
        load_splits(f"folder:{tmp_path}", tmp_path)


def write_table(folder: Path, *rows: str, head: str = "path,pid,camid,split") -> Path:
    table = folder / "people.csv"
    table.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8-sig")
    return table


def test_table(tmp_path: Path) -> None:
    for name in "abcd":
        trees.save(tmp_path / f"{name}.png", name)
    rows = ("a.png,1,0,train", "b.png,alice,3,query", f"{tmp_path}/c.png, alice ,1,gallery")
    table = write_table(tmp_path, *rows, "d.png,-1,0,gallery")
    splits = load_splits(f"csv:{table}", tmp_path)
    assert splits.train[0].subject == "people/train/1"
    assert (splits.query[0].camid, splits.gallery[0].camid) == (3, 1)
    assert splits.query[0].pid == splits.gallery[0].pid > 2**32
    assert len(splits.gallery) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.png,1,x,train", "line 2: .*camid 'x'"),
        ("a.png,1,0,test", "line 2: split is 'test'; expected one of train"),
        (",1,0,train", "line 2: path is ''"),
        ("none.png,1,0,train", "1 pictures .*line 2: .*none.png"),
        ("a.png,1,0,train", "no row with split query or gallery"),
    ],
)
def test_wrong_rows_name_their_line(tmp_path: Path, row: str, message: str) -> None:
    trees.save(tmp_path / "a.png", "a")
    with pytest.raises(DatasetError, match=message):
        load_splits(f"csv:{write_table(tmp_path, row)}", tmp_path)


def test_missing_column(tmp_path: Path) -> None:
    table = write_table(tmp_path, "a.png,1", head="path,pid")
    with pytest.raises(DatasetError, match=r"lacks the column camid, split.*found path,pid"):
        load_splits(f"csv:{table}", tmp_path)


@pytest.mark.parametrize("name", ["folder:/none/at/all", "csv:/none.csv"])
def test_absent(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="is not a f"):
        load_splits(name, tmp_path)
