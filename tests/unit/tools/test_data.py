from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.datasets.synthetic import ensure_synthetic
from data.train_split import make_split
from tests.fixtures import trees
from tests.fixtures.paths import ROOT
from tools.data import main

SMALL = ["--batch", "8"]


def check(root: Path, *options: str) -> int:
    return main(["check", "--root", str(root), *SMALL, *options])


def test_every_data_set_below_a_folder_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.market1501(tmp_path)
    trees.msmt17(tmp_path)
    trees.cuhk03_raw(tmp_path)
    make_split(tmp_path, "market1501")
    make_split(tmp_path, "cuhk03", cuhk03_kind="detected")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert check(tmp_path) == 0
    text = capsys.readouterr().out
    for name in ("market1501", "market1501_val", "msmt17", "cuhk03", "cuhk03_val"):
        assert f"{name}: ok" in text
    assert "layout  MSMT17 V1" in text
    assert "found 10 ids / 60 images / 3 cameras  expected 751 ids / 12,936 images" in text
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


def test_both_kinds_of_cuhk03(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.cuhk03_np(tmp_path, "labeled", "cuhk03-np/labeled")
    trees.cuhk03_np(tmp_path, "detected", "cuhk03-np/detected")
    assert check(tmp_path) == 0
    text = capsys.readouterr().out
    assert "CUHK03 new protocol, labeled" in text
    assert "CUHK03 new protocol, detected" in text


def test_the_kind_of_cuhk03_is_the_one_present_unless_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.cuhk03_np(tmp_path, "detected", "cuhk03-np/detected")
    image = str(tmp_path / "sheet.png")
    assert check(tmp_path, "--name", "cuhk03") == 0
    assert sheet(tmp_path, "--name", "cuhk03", "--output", image) == 0
    assert check(tmp_path, "--name", "cuhk03", "--cuhk03-kind", "labeled") == 1
    assert "only has the detected boxes" in capsys.readouterr().out


def test_both_kinds_of_the_original_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.cuhk03_raw(tmp_path)
    check(tmp_path)
    text = capsys.readouterr().out
    assert "CUHK03 new protocol, labeled" in text
    assert "CUHK03 new protocol, detected" in text


def test_an_unusable_set_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.market1501(tmp_path, cameras=1)
    assert check(tmp_path) == 1
    assert "market1501: NOT USABLE" in capsys.readouterr().out
    assert check(tmp_path, "--no-cross-camera") == 0


def test_a_synthetic_set_is_compared_with_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.market1501(tmp_path)
    folder = ensure_synthetic(tmp_path, identities=2, cameras=2, images=2)
    assert check(tmp_path) == 0
    next((folder / "query").glob("*.jpg")).unlink()
    assert check(tmp_path) == 1
    text = capsys.readouterr().out
    assert "synthetic: NOT USABLE" in text and f"delete {folder} and it is created again" in text
    shutil.rmtree(folder / "bounding_box_val_query")
    assert check(tmp_path) == 1
    assert "market1501: ok" in capsys.readouterr().out  # the others are still reported


def test_an_empty_folder_lists_what_was_searched_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: no data set in")
    pages = {"Market1501": "zheng-lab", "MSMT17": "pkuvmc", "CUHK03": "ee.cuhk.edu.hk"}
    for line, (name, page) in zip(lines[1:], pages.items(), strict=True):
        assert line.startswith(f"  {name} is not in") and page in line
    assert check(tmp_path / "none") == 2
    assert "is not a folder" in capsys.readouterr().err


def test_skip_bad_makes_damaged_images_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trees.market1501(tmp_path)
    (folder / "query" / "0003_c2s2_000300_00.jpg").write_bytes(b"")
    assert check(tmp_path, "--images") == 1
    assert "error: 1 of 99 images cannot be decoded" in capsys.readouterr().out
    assert check(tmp_path, "--images", "--skip-bad") == 0
    assert "warning: 1 of 99" in capsys.readouterr().out


def test_own_data_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trees.market1501(tmp_path, "mine")
    assert check(tmp_path, "--name", f"folder:{folder}", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["counts"]["train"] == {"ids": 10, "images": 60, "cameras": 3}
    assert check(tmp_path, "--name", "folder:nothing", "--json") == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert report["problems"]


def test_runs_as_a_file_without_shadowing_the_data_package(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    command = [sys.executable, "tools/data.py", "check", "--root", str(tmp_path), *SMALL]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "layout  Market-1501" in result.stdout


def sheet(root: Path, *options: str) -> int:
    return main(["sheet", "--root", str(root), *options])


def numbered_people(root: Path) -> Path:
    """Write Market-1501 with plain images: red encodes the person, green the camera."""
    folder = root / "Market-1501-v15.09.15"
    images = [
        ("bounding_box_train", pid, cam)
        for pid in (2, 7, 9)
        for cam in (1, 3)
        if (pid, cam) != (7, 1)
    ]
    images += [("query", 5, 1), ("bounding_box_test", 5, 2), ("bounding_box_test", 0, 2)]
    for subset, pid, cam in images:
        (folder / subset).mkdir(parents=True, exist_ok=True)
        path = folder / subset / f"{pid:04d}_c{cam}s1_000100_01.jpg"
        Image.new("RGB", (32, 64), (20 * pid, 40 * cam, 0)).save(path, quality=100, subsampling=0)
    return root


def colours(path: Path) -> list[list[tuple[int, int] | None]]:
    """Return person and camera of each tile of a sheet; None for grey tiles."""
    pixels = np.asarray(Image.open(path)).astype(int)
    middles = pixels[64::130, 32::66]
    return [
        [None if blue > 99 else (round(red / 20), round(green / 40)) for red, green, blue in row]
        for row in middles
    ]


def test_a_sheet_has_people_as_rows_and_cameras_as_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "sheet.png"
    name = ("--name", "market1501", "--output", str(output))
    assert sheet(numbered_people(tmp_path), *name) == 0
    assert colours(output) == [[(2, 1), (2, 3)], [None, (7, 3)], [(9, 1), (9, 3)]]
    text = capsys.readouterr().out
    assert "people: 2, 7, 9\n" in text and "cameras, counted from 0: 0, 2\n" in text
    assert sheet(tmp_path, *name, "--people", "2") == 2  # no file is replaced without --overwrite
    name = (*name, "--overwrite")
    assert sheet(tmp_path, *name, "--people", "2", "--cameras", "1") == 0
    assert colours(output) == [[(2, 1)], [None]]
    # Distractors have no row.
    assert sheet(tmp_path, *name, "--part", "test") == 0
    assert colours(output) == [[(5, 1), (5, 2)]]


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_a_sheet_prints_the_names_of_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    rows = ["path,pid,camid,split"]
    for person in ("zoe", "bob", "12", "7"):
        for camera in (1, 2):
            for subset in ("query", "gallery"):
                path = tmp_path / "own" / subset / person / f"c{camera}.png"
                trees.save(path, person, camera, subset)
                rows.append(f"{path},{person},{camera},{subset}")
    (tmp_path / "own.csv").write_text("\n".join(rows))
    name = f"folder:{tmp_path}/own" if kind == "folder" else f"csv:{tmp_path}/own.csv"
    output = str(tmp_path / "sheet.png")
    assert sheet(tmp_path, "--name", name, "--part", "test", "--output", output) == 0
    assert "people: 7, 12, bob, zoe\n" in capsys.readouterr().out


def test_errors_of_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = ("--name", "market1501", "--output", str(tmp_path / "sheet.png"))
    assert sheet(tmp_path / "nowhere", *name) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    numbered_people(tmp_path)
    assert sheet(tmp_path, *name, "--part", "validation") == 2
    assert "no validation images; --part can be train or test" in capsys.readouterr().err
    image = next(tmp_path.rglob("bounding_box_train/0002*"))
    image.write_bytes(b"<html>")
    assert sheet(tmp_path, *name) == 1
    assert f"{image}: the file is an HTML page; it is black" in (capsys.readouterr().err)
    assert colours(tmp_path / "sheet.png")[0][0] == (0, 0)
    assert sheet(tmp_path, *name[:3], str(image)) == 2  # an image is not replaced
    assert "give NAME.png" in capsys.readouterr().err


def test_a_check_draws_no_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path, "--name", "synthetic") == 1
    assert "drawn there when it is first used" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ---- draw ---------------------------------------------------------------------------------------


def test_drawn_people_are_a_data_set_with_a_folder_per_person(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people = tmp_path / "people"
    draw = ["draw", str(people), "--identities", "12", "--cameras", "2", "--images", "2"]
    assert main([*draw, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert counts["train"] == {"ids": 12, "images": 48, "cameras": 2}
    assert counts["query"] == counts["gallery"] == {"ids": 6, "images": 12, "cameras": 2}
    assert sorted(path.name for path in (people / "gallery").iterdir()) == [
        f"{pid:04d}" for pid in range(13, 19)
    ]
    assert check(tmp_path, "--name", f"folder:{people}") == 0
    assert "no problems" in capsys.readouterr().out
    assert main(draw) == 2
    assert "exists; give the name of a new folder" in capsys.readouterr().err
    assert main(["draw", str(tmp_path / "new"), "--cameras", "1"]) == 2
    assert "synthetic cameras is 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
