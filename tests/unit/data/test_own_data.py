"""Own data: `folder:PATH` in every layout, and `csv:FILE`."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from data.checks import CheckOptions, check_named
from data.datasets.layout import (
    LoadRequest,
    list_images,
    parse_camera,
    parse_market_name,
    pid_of_text,
    without_decimals,
)
from data.images import BadImage, read_rgb
from data.problems import DatasetError, positive_problems
from data.records import DatasetSplits
from data.registry import load_data, load_splits
from tests.fixtures import trees
from utils.files import existing_path


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


def test_names_that_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~mine`` is a folder here, not the home of a user."""
    monkeypatch.chdir(tmp_path)
    trees.market1501(tmp_path / "~sets", "~mine")
    for name, root in (("folder:~mine", "~sets"), ("folder:~sets/~mine", tmp_path)):
        assert len(load_splits(name, root).train) == 60
    for name in ("~a", "~b", "c"):
        trees.save(tmp_path / "~t" / f"{name}.png", name)
    write_table(tmp_path / "~t", "~a.png,1,0,train", "~b.png,2,1,query", "c.png,2,0,gallery")
    splits = load_splits("csv:~t/people.csv", tmp_path)
    assert splits.train[0].path.endswith("~t/~a.png")


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


def subsets(root: Path, *names: str, subset: tuple[str, ...] = ("query", "gallery")) -> Path:
    """Write the same file names, each with its own content, below each subset."""
    for part in subset:
        for name in names:
            trees.save(root / part / name, part, name)
    return root


@pytest.mark.parametrize(
    ("name", "camera"),
    [
        ("0001_c3s1_000151_01.jpg", 3), ("shop_cam12_0001.jpg", 12), ("C01-0.jpg", 1),
        ("camera1_0.jpg", 1), ("camera_2_0.jpg", 2), ("cam-3.jpg", 3), ("camA_0.jpg", 1),
        ("camera b.jpg", 2), ("c01 (1).jpg", 1), ("x.c4.jpg", 4), ("cam2", 2), ("CAM07", 7),
        ("me.jpg", None), ("abc1_0.jpg", None), ("cab_1.jpg", None), ("camera.jpg", None),
        ("webcam12_1.jpg", None), ("c1d_0.jpg", None),
    ],
)  # fmt: skip
def test_cameras_in_names(name: str, camera: int | None) -> None:
    assert parse_camera(name) == camera


def test_images_without_a_camera_next_to_others_are_reported(tmp_path: Path) -> None:
    subsets(tmp_path, "7/c1_0.png", "7/c2_0.png", "8/camA_0.png", "8/left.png")
    text = warnings(f"folder:{tmp_path}", tmp_path)["some-without-camera"]
    assert text.startswith("2 of 8 images have no camera in their names")
    assert f"for example {tmp_path}/query/8/left.png" in text
    assert "write the camera as _c3_, cam3_" in text


def test_an_unknown_pattern_of_cameras_is_not_only_one_camera(tmp_path: Path) -> None:
    """The error for a single camera also contains how cameras are written."""
    subsets(tmp_path, "7/view1.png", "7/view2.png")
    loaded = load_data(LoadRequest(f"folder:{tmp_path}", tmp_path))
    with pytest.raises(DatasetError, match="put the camera into the file names"):
        positive_problems(loaded.splits.query, loaded.splits.gallery, cross_camera=True)


def test_nested_folders_of_a_person(tmp_path: Path) -> None:
    names = [f"{pid}/cam{camera}/{number}.bmp" for pid in "78" for camera in (1, 2)
             for number in (0, 1)]  # fmt: skip
    subsets(tmp_path, *names)
    splits = load_splits(f"folder:{tmp_path}", tmp_path)
    assert len(splits.query) == 8
    assert {(s.pid, s.camid) for s in splits.gallery} == {(7, 1), (7, 2), (8, 1), (8, 2)}
    assert not warnings(f"folder:{tmp_path}", tmp_path).keys() & {"images-left-out"}


def test_a_circle_of_links_is_read_once(tmp_path: Path) -> None:
    subsets(tmp_path, "7/c1_0.png", "7/c2_0.png")
    (tmp_path / "query" / "7" / "again").symlink_to(tmp_path / "query")
    assert len(load_splits(f"folder:{tmp_path}", tmp_path).query) == 2


def test_every_readable_format_is_loaded(tmp_path: Path) -> None:
    formats = ("bmp", "webp", "png", "jpg", "tif", "ppm")
    subsets(tmp_path, *(f"7/c{n}_0.{suffix}" for n, suffix in enumerate(formats)))
    assert len(load_splits(f"folder:{tmp_path}", tmp_path).gallery) == len(formats)


def test_images_that_are_left_out_are_counted(tmp_path: Path) -> None:
    subsets(tmp_path, "7/c1_0.png", "7/c2_0.png", "loose.png")
    trees.save(tmp_path / "holiday.png", "x")
    (tmp_path / "query" / "9").mkdir()
    for number in range(3):
        (tmp_path / "query" / "9" / f"c1_{number}.heic").write_bytes(b"ftypheic")
    found = warnings(f"folder:{tmp_path}", tmp_path)
    assert (
        f"3 images below {tmp_path} are not used (for example holiday.png)"
        in found["images-left-out"]
    )
    assert "3 images below" in found["format-not-read"]
    assert "(3 .heic); convert them to one of .jpg" in found["format-not-read"]


@pytest.mark.parametrize("name", ["folder", "market1501"])
def test_a_sub_folder_does_not_hide_market_style_images(tmp_path: Path, name: str) -> None:
    folder = trees.market1501(tmp_path)
    shutil.copytree(folder / "bounding_box_train", folder / "bounding_box_train" / "backup")
    name = f"folder:{folder}" if name == "folder" else name
    assert len(load_splits(name, tmp_path).train) == 60
    text = warnings(name, tmp_path)["images-left-out"]
    assert text.startswith(f"60 images in sub-folders of {folder}/bounding_box_train are not used")


def test_the_500k_distractors_are_reported(tmp_path: Path) -> None:
    folder = trees.market1501(tmp_path)
    trees.save(folder / "images" / "00000001.jpg", "distractor")
    assert (
        "500k distractors, 1 images) is not used"
        in warnings("market1501", tmp_path)["distractors-unused"]
    )


def test_veri_folders_are_subsets(tmp_path: Path) -> None:
    for part, pids in (("image_train", (1, 2)), ("image_query", (3,)), ("image_test", (3, 4))):
        for pid in pids:
            for camera in (1, 12):
                trees.save(
                    tmp_path / part / f"{pid:04d}_c{camera:03d}_0001_0.jpg", part, pid, camera
                )
    splits = load_splits(f"folder:{tmp_path}", tmp_path)
    assert [len(part) for part in (splits.train, splits.query, splits.gallery)] == [4, 2, 4]
    assert {s.camid for s in splits.gallery} == {1, 12}


def test_folders_that_are_not_persons_are_an_error(tmp_path: Path) -> None:
    for folder in ("my_train", "my_query", "my_test"):
        trees.save(tmp_path / "a" / folder / "0001_c1_1.png", folder)
    with pytest.raises(DatasetError, match="my_query, my_test, my_train, which are not persons"):
        load_splits(f"folder:{tmp_path}/a", tmp_path)
    for camera in ("cam1", "cam2", "Camera_3"):
        trees.save(tmp_path / "b" / camera / "7" / "1.png", camera)
    with pytest.raises(DatasetError, match="are cameras .*, not persons; arrange"):
        load_splits(f"folder:{tmp_path}/b", tmp_path)


@pytest.mark.parametrize("kind", ["folder", "market-style", "market1501", "csv", "empty train"])
def test_an_evaluation_needs_no_training_part(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        name = f"folder:{subsets(tmp_path, '7/c1_0.png', '7/c2_0.png')}"
    elif kind == "csv":
        subsets(tmp_path, "7/a.png", "7/b.png")
        rows = ("query/7/a.png,7,0,query", "gallery/7/b.png,7,1,gallery")
        name = f"csv:{write_table(tmp_path, *rows)}"
    else:
        folder = trees.market1501(tmp_path)
        shutil.rmtree(folder / "bounding_box_train")
        if kind == "empty train":
            (folder / "bounding_box_train").mkdir()
        name = "market1501" if kind == "market1501" else f"folder:{folder}"
    loaded = load_data(LoadRequest(name, tmp_path))
    assert loaded.splits.train == ()
    assert loaded.splits.query
    (note,) = (p for p in loaded.problems if p.code == "no-training-images")
    assert note.level == "note"
    options = CheckOptions(batch_size=8, num_instances=4)
    assert all(report.is_usable for report in check_named(name, tmp_path, options))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7.0", "7"), ("-1.0", "-1"), ("7", "7"), ("0007", "0007"), ("1e3", "1000"), ("7.5", "7.5"),
     ("alice", "alice"), ("1.0.0", "1.0.0"), ("1e400", "1e400"), ("", "")],
)  # fmt: skip
def test_whole_floats_are_integers(text: str, expected: str) -> None:
    assert without_decimals(text) == expected


def test_a_table_written_by_pandas(tmp_path: Path) -> None:
    for letter in "abcd":
        trees.save(tmp_path / f"{letter}.png", letter)
    rows = ("a.png,5.0,1.0,train", "b.png,7.0,0.0,query", "c.png,7.0,1.0,gallery",
            "d.png,-1.0,1.0,gallery")  # fmt: skip
    table = write_table(tmp_path, *rows)
    splits = load_splits(f"csv:{table}", tmp_path)
    assert [(s.pid, s.camid) for s in (*splits.train, *splits.query, *splits.gallery)] == [
        (5, 1), (7, 0), (7, 1),
    ]  # fmt: skip
    assert "mixed-numbers" not in warnings(f"csv:{table}", tmp_path)
    table = write_table(tmp_path, *rows[:2], "c.png,7,1,gallery")
    text = warnings(f"csv:{table}", tmp_path)["mixed-numbers"]
    assert "7.0 and 7 are one identity" in text
    assert load_splits(f"csv:{table}", tmp_path).gallery[0].pid == 7


NFC, NFD = (unicodedata.normalize(form, "Zo\u00eb") for form in ("NFC", "NFD"))


def test_an_accent_in_two_forms_is_one_identity(tmp_path: Path) -> None:
    subsets(tmp_path, f"{NFC}/c1_0.png", subset=("query",))
    subsets(tmp_path, f"{NFD}/c2_0.png", subset=("gallery",))
    subsets(tmp_path, f"{NFC}/c3_0.png", f"{NFD}/c4_0.png", subset=("train",))
    splits = load_splits(f"folder:{tmp_path}", tmp_path)
    pids = {s.pid for s in (*splits.query, *splits.gallery, *splits.train)}
    assert pids == {pid_of_text(NFC)} == {pid_of_text(NFD)}
    assert len(splits.train) == 2


@pytest.mark.parametrize(("on_disk", "in_table"), [(NFC, NFD), (NFD, NFC)])
def test_paths_are_tried_in_both_forms(tmp_path: Path, on_disk: str, in_table: str) -> None:
    home = tmp_path / on_disk
    for letter in "ab":
        trees.save(home / f"{on_disk}{letter}.png", letter)
    rows = (f"{in_table}a.png,{in_table},0,query", f"{in_table}b.png,{on_disk},1,gallery")
    write_table(home, *rows)
    splits = load_splits(f"csv:{tmp_path}/{in_table}/people.csv", tmp_path)
    assert splits.query[0].pid == splits.gallery[0].pid
    assert Path(splits.query[0].path).is_file()


def test_a_folder_and_its_file_may_have_different_forms(tmp_path: Path) -> None:
    path = tmp_path / NFC / NFD / f"{NFC}.csv"
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert existing_path(tmp_path / NFD / NFD / f"{NFD}.csv") == path
    assert existing_path(tmp_path / NFD / "none") == tmp_path / NFD / "none"
