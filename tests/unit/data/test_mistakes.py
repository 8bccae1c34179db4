"""Common mistakes in data set folders: the same message from `check` and from training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from data.checks import CheckOptions, check_root
from data.datasets.layout import LoadRequest
from data.problems import DatasetError, Problem
from data.registry import load_data, load_splits
from tests.fixtures import trees

SMALL = CheckOptions(batch_size=8, num_instances=4)


class Mistake(NamedTuple):
    make: Callable[[Path], Path]  # writes the tree below a folder, returns DATASETS.ROOT_DIR
    name: str  # of the data set
    code: str
    fix: str  # a part of the message
    stops: bool = True


def too_deep(root: Path) -> Path:
    return trees.market1501(root)


def too_deep_by_two(root: Path) -> Path:
    return trees.market1501(root) / "query"


def too_high(root: Path) -> Path:
    trees.market1501(root / "backup")
    return root


def v2_images_in_v1_folder(root: Path) -> Path:
    folder = trees.msmt17(root, "MSMT17_V2", ("mask_train_v2", "mask_test_v2"))
    lists = folder / "list_train.txt"
    lists.write_text(lists.read_text().replace("0303morning", "0302morning"))
    return root


def v2_images_lists_elsewhere(root: Path) -> Path:
    trees.msmt17(root, "MSMT17_V1")
    trees.msmt17_v2(root)
    for part in ("train", "test"):
        shutil.rmtree(root / "MSMT17_V1" / part)
    for path in sorted((root / "MSMT17_V2").glob("list_*.txt")):
        path.unlink()
    return root


def one_digit(root: Path) -> Path:
    folder = trees.msmt17_market_style(root)
    for part in ("bounding_box_train", "bounding_box_test"):
        for camera in ("0", "1", "4"):
            trees.rename_all(folder / part, f"_c1{camera}_", "_c1_")
    return root


def _mat(content: bytes, name: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        folder = trees.cuhk03_raw(root)
        next(folder.rglob(name)).write_bytes(content)
        return root

    return make


def ground_truth(root: Path) -> Path:
    gallery = trees.market1501(root) / "bounding_box_test"
    shutil.rmtree(gallery)
    for pid in trees.MARKET_TEST:
        for camera in (1, 2, 3):
            trees.save(gallery / f"{pid:04d}_c{camera}s1_000151_00.jpg", pid, camera)
    return root


def ground_truth_beside(root: Path) -> Path:
    folder = trees.market1501(root)
    trees.move(folder / "bounding_box_test", folder / "gt_bbox")
    return root


def cuhk03_np_too_deep(root: Path) -> Path:
    return trees.cuhk03_np(root, "labeled", "cuhk03-np/labeled").parent


def detected_config(root: Path) -> Path:
    trees.cuhk03_images(root, "labeled")
    trees.cuhk03_config(root / "cuhk03", "detected")
    return root


def detected_config_renamed(root: Path) -> Path:
    trees.cuhk03_images(root, "labeled")
    trees.cuhk03_config(root / "cuhk03", "detected", name="labeled")
    return root


def detected_images(root: Path) -> Path:
    trees.cuhk03_images(root, "detected")
    trees.cuhk03_config(root / "cuhk03", "labeled")
    return root


def one_camera(root: Path) -> Path:
    trees.market1501(root, cameras=1)
    return root


def empty_query(root: Path) -> Path:
    folder = trees.market1501(root) / "query"
    shutil.rmtree(folder)
    folder.mkdir()
    return root


def unreadable_names(root: Path) -> Path:
    trees.rename_all(trees.market1501(root) / "query", "_c", "-c")
    return root


def some_unreadable_names(root: Path) -> Path:
    trees.save(trees.market1501(root) / "query" / "holiday.jpg", "x")
    return root


def upper_case(root: Path) -> Path:
    trees.rename_all(trees.market1501(root) / "query", ".jpg", ".JPG")
    return root


def few_identities(root: Path) -> Path:
    train = trees.market1501(root) / "bounding_box_train"
    for path in sorted(train.glob("*.jpg")):
        if not path.name.startswith("0002"):
            path.unlink()
    return root


def truncated(root: Path) -> Path:
    path = trees.market1501(root) / "query" / "0003_c2s2_000300_00.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return root


HTML = b"\n<!DOCTYPE html><html><body>Please log in</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
CONFIG = "cuhk03_new_protocol_config_labeled.mat"
MISTAKES = {
    "root too deep": Mistake(too_deep, "market1501", "wrong-root", "give the folder above: DATA"),
    "root deeper": Mistake(too_deep_by_two, "market1501", "wrong-root", "give the folder above"),
    "root too high": Mistake(too_high, "market1501", "wrong-root", "give DATASETS.ROOT_DIR"),
    "CUHK03-NP too deep": Mistake(
        cuhk03_np_too_deep, "cuhk03", "wrong-root", "give the folder above: DATASETS.ROOT_DIR"
    ),
    "V2, V1 lists": Mistake(
        v2_images_in_v1_folder, "msmt17", "v2-images-v1-lists", "list_*.txt of the MSMT17_V2"
    ),
    "V2, lists elsewhere": Mistake(
        v2_images_lists_elsewhere, "msmt17", "v2-images-v1-lists", "list_*.txt of the MSMT17_V2"
    ),
    "one digit": Mistake(one_digit, "msmt17", "one-digit-camera", "recreate it from", stops=False),
    "HTML .mat": Mistake(_mat(HTML, "cuhk-03.mat"), "cuhk03", "html-as-mat", "in a browser"),
    "LFS .mat": Mistake(_mat(LFS, "cuhk-03.mat"), "cuhk03", "lfs-pointer-as-mat", "git lfs pull"),
    "HTML config": Mistake(_mat(HTML, CONFIG), "cuhk03", "html-as-mat", "in a browser"),
    "LFS config": Mistake(_mat(LFS, CONFIG), "cuhk03", "lfs-pointer-as-mat", "git lfs pull"),
    "empty .mat": Mistake(_mat(b"", "cuhk-03.mat"), "cuhk03", "bad-mat", "download it again"),
    "gt_bbox": Mistake(ground_truth, "market1501", "gt-bbox-as-gallery", "bounding_box_test of"),
    "gt_bbox beside": Mistake(
        ground_truth_beside, "market1501", "missing-folder", "gt_bbox and gt_query cannot replace"
    ),
    "detected config": Mistake(detected_config, "cuhk03", "kind-mismatch", "set CUHK03.KIND"),
    "renamed config": Mistake(detected_config_renamed, "cuhk03", "kind-mismatch", "CUHK03.KIND"),
    "detected images": Mistake(detected_images, "cuhk03", "kind-mismatch", "set CUHK03.KIND"),
    "empty query": Mistake(empty_query, "market1501", "empty-query", "unpack the archive again"),
    "names": Mistake(unreadable_names, "market1501", "no-name-matches", "csv:FILE"),
    "some names": Mistake(
        some_unreadable_names, "market1501", "names-skipped", "rename or remove", stops=False
    ),
    "upper case": Mistake(upper_case, "market1501", "upper-case-suffix", "lower case", stops=False),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_message_contains_the_fix(
    tmp_path: Path, mistake: Mistake, caplog: pytest.LogCaptureFixture
) -> None:
    root = mistake.make(tmp_path / "D")
    if mistake.stops:
        with pytest.raises(DatasetError) as caught:
            load_splits(mistake.name, root)
        problem = caught.value.problem
    else:
        loaded = load_data(LoadRequest(mistake.name, root))
        problem = next(p for p in loaded.problems if p.code == mistake.code)
    assert problem.code == mistake.code
    assert mistake.fix in problem.text
    assert "\n" not in problem.text
    assert problem.text in checked(root, mistake.name)


def checked(root: Path, name: str) -> list[str]:
    """Return the messages of the check command for the same root."""
    try:
        reports = check_root(root, SMALL)
    except DatasetError as error:
        return [error.problem.text]
    return [p.text for report in reports if report.name == name for p in report.problems]


def problems_of(root: Path, **options: object) -> dict[str, Problem]:
    wanted = CheckOptions(**{"batch_size": 8, "num_instances": 4, **options})
    return {p.code: p for report in check_root(root, wanted) for p in report.problems}


def test_a_single_camera_names_the_setting(tmp_path: Path) -> None:
    found = problems_of(one_camera(tmp_path))
    assert "TEST.CROSS_CAMERA False" in found["single-camera"].text
    assert "single-camera" not in problems_of(tmp_path, cross_camera=False)


def test_fewer_identities_than_a_batch_needs(tmp_path: Path) -> None:
    found = problems_of(few_identities(tmp_path))
    assert "use smaller batches" in found["too-few-identities"].text
    assert found["too-few-identities"].level == "error"


def test_truncated_images_are_named_and_counted(tmp_path: Path) -> None:
    root = truncated(tmp_path)
    assert "bad-images" not in problems_of(root)
    text = problems_of(root, open_images=True)["bad-images"].text
    assert "1 of 99 images" in text
    assert "0003_c2s2_000300_00.jpg" in text
    assert "--skip-bad" in text


def test_a_link_without_a_target_is_named(tmp_path: Path) -> None:
    """After the source of a split was moved, its links have no target."""
    query = trees.market1501(tmp_path) / "query"
    (query / "0001_c1s1_000001_00.jpg").symlink_to(tmp_path / "moved" / "away.jpg")
    (query / "0002_c1s1_000001_00.jpg").symlink_to(tmp_path)  # a folder is not an image
    assert len(load_splits("market1501", tmp_path).query) == 13
    options = CheckOptions(batch_size=8, num_instances=4, open_images=True)
    (report,) = check_root(tmp_path, options)
    (bad,) = (problem for problem in report.problems if problem.code == "bad-images")
    assert "0001_c1s1_000001_00.jpg (no such file)" in bad.text
    assert "1 of" in bad.text


def test_absent_and_unknown(tmp_path: Path) -> None:
    (tmp_path / "holidays").mkdir()
    with pytest.raises(DatasetError, match=r"found holidays/") as caught:
        load_splits("msmt17", tmp_path)
    assert caught.value.problem.code == "not-found"
    assert "nothing is downloaded; its authors provide it" in str(caught.value)
    with pytest.raises(DatasetError, match=r"ROOT_DIR .*none is not a folder"):
        load_splits("market1501", tmp_path / "none")
    with pytest.raises(DatasetError, match=r"'markt1501'.*csv:PATH; did you mean market1501\?"):
        load_splits("markt1501", tmp_path)


def test_the_message_for_a_missing_split_contains_the_command(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    with pytest.raises(DatasetError) as caught:
        load_splits("market1501_val", tmp_path)
    command = f"train_split.py --dataset_root_dir '{tmp_path}' --dataset_name 'market1501'"
    assert command in str(caught.value)


def test_a_kind_that_is_not_present(tmp_path: Path) -> None:
    trees.cuhk03_np(tmp_path, "detected", "cuhk03/detected")
    with pytest.raises(DatasetError, match="set CUHK03.KIND detected"):
        load_splits("cuhk03", tmp_path)
    with pytest.raises(DatasetError, match="expected one of labeled, detected"):
        load_splits("cuhk03", tmp_path, cuhk03_kind="labelled")


@pytest.mark.parametrize("length", [3, 100, 600, 5000])
def test_a_truncated_mat_is_an_error_not_a_crash(tmp_path: Path, length: int) -> None:
    folder = trees.cuhk03_raw(tmp_path)
    for path in [*folder.rglob("*.mat")]:
        path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DatasetError):
        load_splits("cuhk03", tmp_path)
