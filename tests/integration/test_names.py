"""File names that are not UTF-8: runs end normally, and names are escaped in logs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures import tiny
from tools import main as command
from utils.errors import UserError
from utils.metric_writer import read_metrics

RESUME = ("SOLVER.RESUME", "True", "SOLVER.MAX_EPOCHS", "2")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name is not UTF-8; skips where the file system does not allow that."""
    folder = tmp_path / os.fsdecode(b"run\xff")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"the file system has UTF-8 names only ({error})")
    return folder


def _mode_c(folder: Path, *overrides: str) -> Path:
    return tiny.run(folder, "MODEL.MODE", "C", *overrides)


def test_a_run_in_such_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = _mode_c(folder, "SOLVER.MAX_EPOCHS", "1")
    run = _mode_c(folder, *RESUME)
    log = (run / "log.txt").read_text("utf-8")
    assert r"Running with OUTPUT_DIR" in log
    assert r"run\udcff" in log
    assert "TensorBoard cannot write to" in log
    assert len(read_metrics(run / "metrics.jsonl")) > 0
    text = "".join(capfd.readouterr())
    assert "Logging error" not in text
    assert "Traceback" not in text


def test_errors_about_such_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = tiny.arguments(folder, "SOLVER.RESUME", "True")
    assert command.main(argv) == 2
    assert r"run\udcff" in capsys.readouterr().err.encode().decode("utf-8")


def test_a_data_set_with_such_names(tmp_path: Path, folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, pids in (("train", range(4)), ("query", (4, 5)), ("gallery", (4, 5))):
        for pid in pids:
            identity = folder / part / os.fsdecode(b"p%d\xfe" % pid)
            identity.mkdir(parents=True)
            for camera in (1, 2, 3, 4):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(identity / os.fsdecode(b"c%d_\xfe.png" % camera))
    data = ("DATASETS.ROOT_DIR", str(tmp_path), "DATASETS.NAMES", f"folder:{folder.name}")
    plan = ("SOLVER.MAX_EPOCHS", "1", "EVAL.DETAILS", "on", "MODEL.VAL_R1", "inf")
    run = _mode_c(tmp_path / "out", *data, *plan)
    assert b"p4\xfe" in (run / "per_query.csv").read_bytes()
    assert tiny.results(run)["dataset"] == f"folder:{folder.name}"


def test_colour_codes_of_libraries_are_removed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(cfg: object) -> None:
        raise UserError("the file \x1b[1mcannot be loaded\x1b[0m")

    monkeypatch.setattr(sys.modules["tools.main"], "run", fail)
    assert command.main(tiny.arguments(tmp_path)) == 2
    assert capsys.readouterr().err == "error: the file cannot be loaded\n"
