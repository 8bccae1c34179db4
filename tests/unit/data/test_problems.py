"""Checks across subsets: matches of queries, copies, and what is checked before a training."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.build import check_before_training
from data.checks import CheckOptions, _fit_problems, check_named
from data.datasets.layout import LoadRequest
from data.problems import (
    DatasetError,
    check_positives,
    copy_problems,
    positive_problems,
    queries_without_match,
)
from data.records import DatasetSplits, Sample
from data.registry import load_splits, split_command
from tests.fixtures import trees
from tests.fixtures.images import image_splits
from utils.errors import UserError
from utils.world import World

PEOPLE = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=20)


def make(people: list[tuple[int, int]], prefix: str = "q") -> list[Sample]:
    return [Sample(f"{prefix}{i}", pid, cam, "") for i, (pid, cam) in enumerate(people)]


@given(PEOPLE, PEOPLE, st.booleans())
def test_counts_match_a_naive_loop(
    query: list[tuple[int, int]], gallery: list[tuple[int, int]], cross: bool
) -> None:
    found = queries_without_match(make(query), make(gallery, "g"), cross_camera=cross)
    naive = [sum(p == q and (c != k or not cross) for p, c in gallery) for q, k in query]
    assert [s.path for s in found] == [f"q{i}" for i, count in enumerate(naive) if not count]


def test_queries_without_a_match_are_named(caplog: pytest.LogCaptureFixture) -> None:
    query, gallery = make([(1, 0), (2, 0)]), make([(1, 1), (2, 0)], "g")
    with caplog.at_level(logging.WARNING, "reid_baseline"):
        (problem,) = check_positives(query, gallery, cross_camera=True)
    assert problem.text.startswith("1 of the 2 test queries have no match in another camera")
    assert problem.text.endswith(": q1")
    assert problem.text in caplog.messages
    assert positive_problems(query, gallery, cross_camera=False) == ()


@pytest.mark.parametrize(
    ("query", "gallery", "message"),
    [
        ([(1, 0)], [(2, 1)], "none of the 1 test queries"),
        ([(1, 0)], [(1, 0)], "TEST.CROSS_CAMERA False"),
        ([], [(1, 0)], "0 queries and 1 gallery"),
        ([(1, 0)], [], "1 queries and 0 gallery"),
    ],
)
def test_queries_that_cannot_be_scored_are_an_error(
    query: list[tuple[int, int]], gallery: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        positive_problems(make(query), make(gallery), cross_camera=True)


def test_a_validation_that_cannot_be_scored_is_reported_next_to_a_valid_test() -> None:
    options = CheckOptions(batch_size=1, num_instances=1)
    query, gallery = tuple(make([(1, 0)])), tuple(make([(1, 1)], "g"))
    splits = DatasetSplits("mine", tuple(make([(2, 0)])), query, gallery)
    assert _fit_problems(splits, options) == []
    lost = replace(splits, val_query=query, val_gallery=tuple(make([(3, 1)], "g")))
    (problem,) = _fit_problems(lost, options)
    assert problem.text.startswith("none of the 1 validation queries")


def copied(folder: Path, source: str, target: str) -> str:
    """Copy the first file of a sub-folder into another under another camera; return its name."""
    original = min((folder / source).glob("0*.jpg"))
    name = original.name.replace("_c1", "_c3").replace("_0", "_9", 1)
    shutil.copy(original, folder / target / name)
    return name


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("query", "bounding_box_test", "1 of 12 queries are copies of gallery images"),
        ("bounding_box_train", "query", "1 of 40 test images are copies of training images"),
        ("bounding_box_train", "bounding_box_test", "1 of 40 test images are copies of training"),
    ],
)
def test_copies_are_reported_by_content(
    tmp_path: Path, source: str, target: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = trees.market1501(tmp_path)
    assert "copies" not in load_splits("market1501", tmp_path).notes
    name = copied(folder, source, target)
    with caplog.at_level(logging.WARNING, "reid_baseline"):
        splits = load_splits("market1501", tmp_path)  # what every run calls
    assert splits.notes["copies"].startswith(expected)
    (text,) = (text for text in caplog.messages if "copies" in text)
    assert name in text
    for dataset in ("market1501", f"folder:{folder}"):
        (report,) = check_named(dataset, tmp_path, CheckOptions(batch_size=8))
        assert any(p.code == "copies" and expected in p.text for p in report.problems)
        assert "copies" in report.notes


def test_a_table_is_compared_by_content_not_by_path(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        trees.save(tmp_path / f"{name}.png", "c" if name == "b" else name)
    rows = ["path,pid,camid,split", "a.png,1,0,train", "b.png,2,0,query", "c.png,2,1,gallery"]
    (tmp_path / "people.csv").write_text("\n".join(rows))
    assert load_splits(f"csv:{tmp_path}/people.csv", tmp_path).notes["copies"] == (
        "1 of 1 queries are copies of gallery images"
    )


def test_copies_are_counted_like_a_naive_loop(tmp_path: Path) -> None:
    contents = {"q": "aab", "g": "bcd", "t": "dbx", "v": "xa", "w": "za"}
    parts: dict[str, tuple[Sample, ...]] = {}
    for part, letters in contents.items():
        paths = [trees.save(tmp_path / f"{part}{i}.png", c) for i, c in enumerate(letters)]
        parts[part] = tuple(Sample(str(path), 1, 0, "") for path in paths)
    splits = DatasetSplits("x", parts["t"], parts["q"], parts["g"], parts["v"], parts["w"])
    counts = [problem.text.partition(" are copies")[0] for problem in copy_problems(splits)]
    assert counts == [
        "1 of 3 queries", "1 of 2 validation queries", "3 of 6 test images",
        "1 of 4 validation images",
    ]  # fmt: skip
    lost = replace(splits, query=(*splits.query, Sample(str(tmp_path / "gone.png"), 1, 0, "")))
    assert len(copy_problems(lost)) == 4


@pytest.fixture
def splits(tmp_path: Path) -> DatasetSplits:
    return image_splits(tmp_path, [4, 4, 4])


def test_valid_data_pass_the_check_before_a_training(
    splits: DatasetSplits, make_cfg: Callable[..., object]
) -> None:
    check_before_training(make_cfg(), splits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, train=()), "no training images, so it can only be evaluated"),
        (lambda s: replace(s, gallery=()), "0 gallery images; it needs both"),
        (lambda s: replace(s, gallery=s.train[8:]), "none of the 5 test queries has a match"),
        (
            lambda s: replace(s, query=tuple(replace(q, camid=0) for q in s.query),
                              gallery=tuple(replace(g, camid=0) for g in s.gallery)),
            "all test images are from one camera",
        ),
        (
            lambda s: replace(s, val_query=s.query, val_gallery=s.train[8:]),
            "none of the 5 validation queries has a match",
        ),
    ],
)  # fmt: skip
def test_an_evaluation_that_would_fail_is_an_error_before_the_training(
    splits: DatasetSplits,
    make_cfg: Callable[..., object],
    change: Callable[[DatasetSplits], DatasetSplits],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        check_before_training(make_cfg(), change(splits))


@pytest.mark.parametrize("mode", ["stream", "memory"])
@pytest.mark.parametrize("validation", [False, True])
def test_a_damaged_evaluation_image_is_an_error_before_the_training(
    splits: DatasetSplits, make_cfg: Callable[..., object], mode: str, validation: bool
) -> None:
    if validation:
        splits = replace(splits, val_query=splits.query, val_gallery=splits.gallery)
    damaged = Path(splits.gallery[-1].path)
    damaged.write_bytes(damaged.read_bytes()[:300])
    cfg = make_cfg("CACHE.MODE", mode)
    with pytest.raises(UserError, match=f"1 of 12 images cannot be decoded: {damaged}"):
        check_before_training(cfg, splits)
    check_before_training(make_cfg("CACHE.MODE", mode, "CACHE.SKIP_BAD", True), splits)
    ranks = []
    for rank in range(2):  # each rank checks its part
        try:
            check_before_training(cfg, splits, World(rank, 2))
        except UserError:
            ranks.append(rank)
    assert len(ranks) == 1


@pytest.mark.parametrize(
    ("name", "split", "given"),
    [
        ("market1501", "market1501_val", "market1501"),
        ("folder:my/people", "folder:my/people_val", "folder:my/people"),
        ("csv:my/people.csv", "folder:my/people_val", "csv:my/people.csv"),
        ("cuhk03", "cuhk03_val", "cuhk03' --cuhk03_kind 'detected"),
    ],
)
def test_the_advice_for_a_validation_split_names_what_can_be_loaded(
    name: str, split: str, given: str
) -> None:
    text = split_command(LoadRequest(name, Path("D"), cuhk03_kind="detected"))
    assert f"train on '{split}'" in text
    assert f"--dataset_root_dir 'D' --dataset_name '{given}'" in text
