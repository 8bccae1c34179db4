from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.datasets.layout import LoadRequest, list_images, parse_market_name, pid_of_text
from data.images import BadImage, read_rgb
from data.problems import DatasetError
from data.records import DatasetSplits
from data.registry import load_data, load_splits
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


def test_a_path_may_be_relative_to_the_root(tmp_path: Path) -> None:
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


def test_persons_alone_are_divided_the_same_way_every_time(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("divided", [True, False])
def test_a_folder_named_as_junk_is_left_out(tmp_path: Path, divided: bool) -> None:
    for part in ("train", "query", "gallery") if divided else ("",):
        people(tmp_path / part, names=("-1", "1", "2", "3"))
    splits = load_splits(f"folder:{tmp_path}", tmp_path)
    found = [*splits.train, *splits.query, *splits.gallery, *splits.val_query, *splits.val_gallery]
    assert {sample.pid for sample in found} == {1, 2, 3}


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
        ("a.png,1,4²,train", "line 2: .*camid '4²'"),
        (f"a.png,1,{'9' * 30},train", "line 2: .*camid '999"),
        ("none.png,1,0,train", "1 images .*line 2: .*none.png"),
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


def warnings(name: str, root: Path) -> dict[str, str]:
    loaded = load_data(LoadRequest(name, root))
    return {problem.code: problem.text for problem in loaded.problems}


def test_numbers_too_large_for_int64_are_names(tmp_path: Path) -> None:
    huge = {pid_of_text(text) for text in ("9" * 19, "9" * 30, "9" * 5000)}
    assert len(huge) == 3
    assert all(2**32 < pid < 2**62 for pid in huge)
    assert pid_of_text(str(2**63 - 1)) == 2**63 - 1
    assert parse_market_name(f"{'9' * 30}_c1_1.jpg") is None
    assert parse_market_name(f"1_c{'9' * 30}_1.jpg") is None


def test_a_folder_name_may_contain_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    assert pid_of_text(os.fsdecode(b"caf\xe9")) != pid_of_text("café")


def test_a_circular_link_is_named_when_it_is_opened(tmp_path: Path) -> None:
    (tmp_path / "0001_c1_1.jpg").symlink_to("0001_c1_1.jpg")
    (found,) = list_images(tmp_path)
    with pytest.raises(BadImage, match="0001_c1_1"):
        read_rgb(found)


def test_persons_in_training_and_test_are_named(tmp_path: Path) -> None:
    for letter in "abcd":
        trees.save(tmp_path / f"{letter}.png", letter)
    rows = ["a.png,1,0,train", "b.png,2,0,train", "c.png,2,0,query", "d.png,2,1,gallery"]
    found = warnings(f"csv:{write_table(tmp_path, *rows)}", tmp_path)
    assert "1 persons are both in the training and in the test set (pid 2)" in found.pop(
        "persons-not-strangers"
    )
    assert not found
    strangers = [row.replace(",2,", ",3,") if "train" in row else row for row in rows]
    assert not warnings(f"csv:{write_table(tmp_path, *strangers)}", tmp_path)


def test_persons_in_training_and_test_folders_are_named(tmp_path: Path) -> None:
    for subset, names in (("train", ("1", "7")), ("query", ("7", "8")), ("gallery", ("7", "8"))):
        people(tmp_path / subset, names=names)
    assert "(pid 7)" in warnings(f"folder:{tmp_path}", tmp_path)["persons-not-strangers"]


def test_an_image_in_two_rows_is_named(tmp_path: Path) -> None:
    for letter in "ab":
        trees.save(tmp_path / f"{letter}.png", letter)
    table = write_table(tmp_path, "a.png,1,0,train", "b.png,2,0,query", "b.png,2,1,gallery")
    assert "b.png" in warnings(f"csv:{table}", tmp_path)["same-image-twice"]
