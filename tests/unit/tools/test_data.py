from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.train_split import make_split
from tests.fixtures import trees
from tests.fixtures.paths import ROOT
from tools.data import main

SMALL = ["--batch", "8"]


def check(root: Path, *options: str) -> int:
    return main(["check", "--root", str(root), *SMALL, *options])


def test_prints_every_set_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.market1501(tmp_path)
    trees.msmt17(tmp_path)
    trees.cuhk03_raw(tmp_path)
    make_split(tmp_path, "market1501")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert check(tmp_path) == 0
    text = capsys.readouterr().out
    for name in ("market1501: ok", "market1501_val: ok", "msmt17: ok", "cuhk03: ok"):
        assert name in text
    assert "layout  MSMT17 V1" in text
    assert "found 10 ids / 60 images / 3 cameras  expected 751 ids / 12,936 images" in text
    assert sorted(tmp_path.rglob("*")) == before  # looking changes nothing


def test_both_kinds_of_cuhk03(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.cuhk03_np(tmp_path, "labeled", "cuhk03-np/labeled")
    trees.cuhk03_np(tmp_path, "detected", "cuhk03-np/detected")
    assert check(tmp_path) == 0
    text = capsys.readouterr().out
    assert "CUHK03 new protocol, labeled" in text
    assert "CUHK03 new protocol, detected" in text


def test_an_unusable_set_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.market1501(tmp_path, cameras=1)
    assert check(tmp_path) == 1
    assert "market1501: NOT USABLE" in capsys.readouterr().out
    assert check(tmp_path, "--no-cross-camera") == 0


def test_bad_pictures_can_be_forgiven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trees.market1501(tmp_path)
    (folder / "query" / "0003_c2s2_000300_00.jpg").write_bytes(b"")
    assert check(tmp_path, "--images") == 1
    assert "error: 1 of 99 pictures cannot be decoded" in capsys.readouterr().out
    assert check(tmp_path, "--images", "--skip-bad") == 0
    assert "warning: 1 of 99" in capsys.readouterr().out


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no data set in")
    assert error.count("\n") == 1
    assert check(tmp_path / "none") == 2
    assert "is not a folder" in capsys.readouterr().err


def test_ones_own_data_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trees.market1501(tmp_path, "mine")
    assert check(tmp_path, "--name", f"folder:{folder}", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["counts"]["train"] == {"ids": 10, "images": 60, "cameras": 3}
    assert check(tmp_path, "--name", "folder:nothing") == 1


def test_runs_as_a_file_without_shadowing_the_data_package(tmp_path: Path) -> None:
    trees.market1501(tmp_path)
    command = [sys.executable, "tools/data.py", "check", "--root", str(tmp_path), *SMALL]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "layout  Market-1501" in result.stdout
