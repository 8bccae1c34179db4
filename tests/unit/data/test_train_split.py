"""`data/train_split.py`: every source, links and copies, interrupted and repeated runs."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import train_split
from data.datasets.layout import LoadRequest, parse_market_name
from data.datasets.market1501 import VALIDATION_FOLDERS
from data.images import read_rgb
from data.problems import queries_without_match
from data.records import DatasetSplits, Sample
from data.registry import load_data, load_splits
from data.train_split import main, make_split
from tests.fixtures import trees
from tests.fixtures.paths import ROOT
from utils.errors import UserError

SOURCES = {
    "market1501": trees.market1501,
    "msmt17": trees.msmt17,
    "msmt17 V2": trees.msmt17_v2,
    "msmt17 Market-style": trees.msmt17_market_style,
    "cuhk03 raw": trees.cuhk03_raw,
    "cuhk03 extracted": trees.cuhk03_extracted,
    "cuhk03 NP": trees.cuhk03_np,
}
CUHK_ROUTES = [source for source in SOURCES if source.startswith("cuhk03")]


def pixels_of(samples: tuple[Sample, ...]) -> list[tuple[int, int, bytes]]:
    return sorted((s.pid, s.camid, np.asarray(read_rgb(s.path)).tobytes()) for s in samples)


def all_train(splits: DatasetSplits) -> tuple[Sample, ...]:
    return (*splits.train, *splits.val_query, *splits.val_gallery)


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "split.json"
    }


@pytest.mark.parametrize("source", SOURCES)
def test_a_split_contains_every_person_and_image(tmp_path: Path, source: str) -> None:
    name = source.split()[0]
    SOURCES[source](tmp_path)
    assert main(["--dataset_root_dir", str(tmp_path), "--dataset_name", name]) == 0
    whole = load_splits(name, tmp_path)
    split = load_splits(f"{name}_val", tmp_path)
    assert pixels_of(all_train(split)) == pixels_of(whole.train)
    assert pixels_of(split.query) == pixels_of(whole.query)
    assert pixels_of(split.gallery) == pixels_of(whole.gallery)
    assert {s.subject for s in all_train(split)} == {s.subject for s in whole.train}
    assert {s.subject for s in split.query} == {s.subject for s in whole.query}
    held_out = {s.pid for s in (*split.val_query, *split.val_gallery)}
    assert held_out
    assert not held_out & {s.pid for s in split.train}
    assert not queries_without_match(split.val_query, split.val_gallery, cross_camera=True)
    for sample in (*all_train(split), *split.query, *split.gallery):
        assert parse_market_name(sample.path) == (sample.pid, sample.camid + 1)


def test_the_record_of_a_split(tmp_path: Path) -> None:
    trees.msmt17(tmp_path)
    target = make_split(tmp_path, "msmt17", seed=3, msmt17_protocol="trainval")
    record = json.loads((target / "split.json").read_text())
    assert (record["dataset"], record["strategy"], record["seed"]) == ("msmt17", "identity", 3)
    assert record["images"] == "hard link"
    assert record["notes"]["protocol"] == "MSMT17, trained on trainval"
    for folder in VALIDATION_FOLDERS.values():
        assert record["counts"][folder]["images"] == len(list((target / folder).iterdir()))
    assert len(record["hash"]) == 64


def test_cameras_of_msmt17_are_not_padded(tmp_path: Path) -> None:
    trees.msmt17(tmp_path)
    names = {p.name for p in (make_split(tmp_path, "msmt17") / "bounding_box_test").iterdir()}
    assert {n.split("_")[1] for n in names} == {"c11", "c14"}
    assert "0000_c11_0001.jpg" in names  # 0000 is the person's query


def test_the_same_seed_gives_the_same_split_in_any_folder(tmp_path: Path) -> None:
    for root in ("a", "b"):
        trees.market1501(tmp_path / root, "market1501" if root == "a" else "Market")
    first = make_split(tmp_path / "a", "market1501")
    second = make_split(tmp_path / "b", "market1501", output_dir=tmp_path / "c")
    third = make_split(tmp_path / "b", "market1501", output_dir=tmp_path / "d", seed=2)
    assert listing(first) == listing(second) != listing(third)
    hashes = [json.loads((f / "split.json").read_text())["hash"] for f in (first, second, third)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_every_layout_of_cuhk03_gives_the_same_tree(tmp_path: Path) -> None:
    found = []
    for route in CUHK_ROUTES:
        SOURCES[route](tmp_path / route)
        target = make_split(tmp_path / route, "cuhk03", output_dir=tmp_path / route / "out")
        folders = [target / name for name in VALIDATION_FOLDERS.values()]
        found.append({p.relative_to(target) for f in folders for p in f.iterdir()})
        assert sorted(p.name for p in target.iterdir()) == sorted(
            [*VALIDATION_FOLDERS.values(), "split.json"]
        )
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("source", ["market1501", "cuhk03 raw"])
def test_with_output_dir_the_data_are_not_changed(tmp_path: Path, source: str) -> None:
    root = tmp_path / "D"
    SOURCES[source](root)
    before = listing(root)
    name = source.split()[0]
    target = make_split(root, name, output_dir=tmp_path / "O")
    assert target == tmp_path / "O" / f"{name}_val"
    assert listing(root) == before
    assert [p.name for p in (tmp_path / "O").iterdir()] == [target.name]


def test_symbolic_links_and_copies_where_hard_links_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.market1501(tmp_path / "D")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    linked = make_split(tmp_path / "D", "market1501", output_dir=tmp_path / "a")
    assert next((linked / "query").iterdir()).is_symlink()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    copied = make_split(tmp_path / "D", "market1501", output_dir=tmp_path / "b")
    assert json.loads((copied / "split.json").read_text())["images"] == "copy"
    assert listing(linked) == listing(copied)


def test_published_strategy(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    make_split(tmp_path, "market1501", strategy="published")
    split = load_splits("market1501_val", tmp_path)
    assert [len(p) for p in (split.train, split.val_query, split.val_gallery)] == [48, 2, 10]
    assert split.notes["split"].startswith("published, seed 1")


def test_an_existing_split_is_kept_without_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.market1501(tmp_path)
    arguments = ["--dataset_root_dir", str(tmp_path), "--dataset_name", "market1501"]
    target = make_split(tmp_path, "market1501")
    before = listing(target)
    assert main([*arguments, "--seed", "2"]) != 0
    assert "exists" in capsys.readouterr().err
    assert listing(target) == before
    assert main([*arguments, "--seed", "2", "--overwrite"]) == 0
    assert listing(target) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["market1501", "market1501_val"]


def test_overwrite_deletes_nothing_but_a_split(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    precious = tmp_path / "market1501_val" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("x")
    with pytest.raises(UserError, match="is not a validation split"):
        make_split(tmp_path, "market1501", overwrite=True)
    assert precious.exists()


def test_failure_keeps_the_old_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.market1501(tmp_path)
    target = make_split(tmp_path, "market1501")
    before = listing(target)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_split, "write_record", full)
    arguments = ["--dataset_root_dir", str(tmp_path), "--dataset_name", "market1501"]
    assert main([*arguments, "--overwrite"]) == 1
    assert listing(target) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["market1501", "market1501_val"]


def test_a_changed_tree_is_reported(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    target = make_split(tmp_path, "market1501")
    assert not load_data(LoadRequest("market1501_val", tmp_path)).problems
    next((target / "bounding_box_train").iterdir()).unlink()
    loaded = load_data(LoadRequest("market1501_val", tmp_path))
    assert [p.code for p in loaded.problems] == ["split-changed"]
    (target / "split.json").write_text("{")
    with pytest.raises(UserError, match=r"split.json is damaged"):
        load_splits("market1501_val", tmp_path)


@pytest.mark.parametrize(
    ("name", "made", "other", "source"),
    [
        ("cuhk03", "detected", "labeled", trees.cuhk03_raw),
        ("msmt17", "trainval", "train", trees.msmt17),
    ],
)
def test_a_split_of_another_protocol_or_kind_is_an_error(
    tmp_path: Path, name: str, made: str, other: str, source: Callable[[Path], Path]
) -> None:
    source(tmp_path)
    field = {"cuhk03": "cuhk03_kind", "msmt17": "msmt17_protocol"}[name]
    line = ["--dataset_root_dir", str(tmp_path), "--dataset_name", name]
    assert main([*line, f"--{field}", made]) == 0
    record = tmp_path / f"{name}_val" / "split.json"
    content = json.loads(record.read_text())
    assert content.pop(field) == made
    for text in (record.read_text(), json.dumps(content)):  # as written, and by earlier versions
        record.write_text(text)
        load_splits(f"{name}_val", tmp_path, **{field: made})
        with pytest.raises(UserError, match=f"was made with .* {made}, but .* is {other}") as error:
            load_splits(f"{name}_val", tmp_path, **{field: other})
        assert f"--{field} '{other}' --overwrite" in str(error.value)
    record.unlink()
    load_splits(f"{name}_val", tmp_path, **{field: other})


def test_killed_at_any_moment_leaves_no_split(tmp_path: Path) -> None:
    """After a kill -9 while linking, the next run removes the leftovers and succeeds."""
    trees.market1501(tmp_path / "D")
    code = (
        "import os, signal, sys\n"
        "from data import train_split\n"
        "from data.train_split import main\n"
        "link, left = train_split._link, [int(sys.argv[1])]\n"
        "def dying(*arguments):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return link(*arguments)\n"
        "train_split._link = dying\n"
        "main(['--dataset_root_dir', 'D', '--dataset_name', 'market1501'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "40"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, check=False, capture_output=True
    )
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "D" / "market1501_val").exists()
    assert len(list((tmp_path / "D").iterdir())) == 2  # the unfinished split, under a hidden name
    make_split(tmp_path / "D", "market1501")
    assert sorted(p.name for p in (tmp_path / "D").iterdir()) == ["market1501", "market1501_val"]


def test_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.market1501(tmp_path)

    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_split, "_link", interrupt)
    arguments = ["--dataset_root_dir", str(tmp_path), "--dataset_name", "market1501"]
    assert main(arguments) == 130
    assert [p.name for p in tmp_path.iterdir()] == ["market1501"]


def test_runs_as_published_from_the_repository_root(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    result = subprocess.run(
        [
            sys.executable, "data/train_split.py",
            "--dataset_root_dir", str(tmp_path), "--dataset_name", "market1501",
        ],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "=> Market1501 loaded" in result.stdout
    assert (tmp_path / "market1501_val" / "split.json").is_file()


@pytest.mark.parametrize("kind", ["market-style", "persons", "names", "csv"])
def test_own_data_are_split(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("ann", "bob", "c", "d", "e") if kind == "names" else ("11", "12", "13", "14", "15")
    if kind == "market-style":
        own = trees.market1501(tmp_path, "own")
    else:
        own = tmp_path / "own"
        rows = ["path,pid,camid,split"]
        for subset, people in (("train", names), ("query", ("1",)), ("gallery", ("1", "2"))):
            for person, camera, number in itertools.product(people, (0, 3), (1, 2)):
                path = own / subset / person / f"c{camera}_{number}.png"
                trees.save(path, subset, person, camera, number)
                rows.append(f"{path},{person},{camera},{subset}")
        (tmp_path / "own.csv").write_text("\n".join(rows))
    name = f"csv:{tmp_path}/own.csv" if kind == "csv" else f"folder:{own}"
    assert main(["--dataset_name", name]) == 0
    made = f"folder:{tmp_path}/own_val"
    assert f"train with DATASETS.NAMES \"('{made}')\"" in capsys.readouterr().out
    whole, split = load_splits(name, tmp_path), load_splits(made, tmp_path)
    assert pixels_of(all_train(split)) == pixels_of(whole.train)
    assert pixels_of((*split.query, *split.gallery)) == pixels_of((*whole.query, *whole.gallery))
    assert {s.subject for s in all_train(split)} == {s.subject for s in whole.train}
    assert not queries_without_match(split.val_query, split.val_gallery, cross_camera=True)
    assert split.notes["split"].startswith("identity, seed 1")
    assert main(["--dataset_name", made, "--output_dir", str(tmp_path / "again")]) == 2
    assert "has a validation split; train on it directly" in capsys.readouterr().err


def test_own_images_of_a_single_camera_are_split(tmp_path: Path) -> None:
    for subset, people in (("train", "1234"), ("query", "5"), ("gallery", "5")):
        for person, number in itertools.product(people, (1, 2)):
            trees.save(tmp_path / "own" / subset / person / f"{number}.png", subset, person, number)
    assert main(["--dataset_name", f"folder:{tmp_path}/own"]) == 0
    made = f"folder:{tmp_path}/own_val"
    split = load_splits(made, tmp_path)
    assert not queries_without_match(split.val_query, split.val_gallery, cross_camera=False)
    record = json.loads((tmp_path / "own_val/split.json").read_text())
    assert record["queries_without_match"] == 0


def test_images_of_a_table_with_any_suffix_are_in_the_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table can list files whose suffix is not one of an image; folders are read by suffix."""
    rows = ["path,pid,camid,split"]
    suffixes = itertools.cycle((".jfif", ".gif", "", ".png", ".PNG"))
    for person, camera, number in itertools.product(range(8), (0, 3), (1, 2)):
        subset = "train" if person < 6 else "gallery" if camera or number == 2 else "query"
        path = trees.save(tmp_path / f"{person}_c{camera}_{number}.png", person, camera, number)
        path = path.rename(path.with_suffix(next(suffixes)))
        rows.append(f"{path.name},{person},{camera},{subset}")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    target = make_split(tmp_path, f"csv:{tmp_path}/own.csv")
    whole, split = (
        load_splits(name, tmp_path) for name in (f"csv:{tmp_path}/own.csv", f"folder:{target}")
    )
    assert pixels_of(all_train(split)) == pixels_of(whole.train)
    assert pixels_of((*split.query, *split.gallery)) == pixels_of((*whole.query, *whole.gallery))
    # Names that the loader does not read are an error.
    monkeypatch.setattr(train_split, "is_image_name", lambda name: name.endswith(".gif"))
    with pytest.raises(UserError, match="are missing when its split is loaded"):
        make_split(tmp_path, f"csv:{tmp_path}/own.csv", overwrite=True)
    assert load_splits(f"folder:{target}", tmp_path) == split


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "market1501"], "market1501 needs --dataset_root_dir D"),
        (
            ["--dataset_name", "synthetic"],
            "expected one of market1501, msmt17, cuhk03, folder:PATH",
        ),
        (["--dataset_name", "folder:/none"], "/none is not a folder"),
    ],
)
def test_wrong_names_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
