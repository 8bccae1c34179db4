"""The published command lines, as a shell passes them, on small copies of the data set layouts.

A shell reads each line. Its python3 is a script that prints the arguments, which are then given to
the program in this process: a new process takes seconds to import torch. One line is run unchanged.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data import train_split
from engine.report import DIRECTIONS
from tests.fixtures import tiny, trees
from tests.fixtures.paths import ROOT
from tools import main as command

# Keys that make a run small; no key of the published lines is repeated.
SMALL = (
    "MODEL.DEVICE cpu MODEL.NAME resnet18 MODEL.NGF 2 MODEL.NDF 2 UNET.NUM_DOWNS 5 "
    "INPUT.IMG_SIZE '(32, 32)' INPUT.PADDING 2 DATALOADER.NUM_WORKERS 0 DATALOADER.NUM_INSTANCE 2 "
    "SOLVER.IMS_PER_BATCH 8 SOLVER.MAX_EPOCHS 1 TEST.IMS_PER_BATCH 64 EVAL.REPORT off"
)
# Comes last, so it overrides the configuration file. Tests do not download ImageNet weights.
NO_WEIGHTS = "MODEL.PRETRAIN_CHOICE none"

SPLIT = "python3 data/train_split.py --dataset_root_dir '{D}' --dataset_name '{set}'"
TRAIN = (
    "python3 tools/main.py --config_file='configs/AGW_baseline.yml' DATASETS.ROOT_DIR \"{D}\" "
    'DATASETS.NAMES "(\'{set}_val\')" INPUT.TYPE "{type}" INPUT.RADIUS "{radius}" '
    "OUTPUT_DIR \"('./log/{set}/{set}-{method}-{type}')\""
)
BASE, FULL = ' MODEL.MODE "C"', ' MODEL.VAL_R1 "0.75"'
TEST = (
    " TEST.EVALUATE_ONLY \"('on')\" MODEL.PRETRAIN_CHOICE \"('self')\" "
    'MODEL.PRETRAIN_DIR "./log/{set}/{set}-{method}-{type}"'
)
METHODS = {"base": BASE, "wosu": "", "full": FULL}
TREES: dict[str, Callable[[Path], Path]] = {
    "market1501": trees.market1501,
    "msmt17": trees.msmt17,
    "cuhk03": trees.cuhk03_raw,
}
TYPES = {"market1501": ("mosaic", "24.0"), "msmt17": ("blur", "12.0"), "cuhk03": ("noise", "0.5")}
TITLES = {"market1501": "Market1501", "msmt17": "MSMT17", "cuhk03": "CUHK03"}
PYTHON = """#!/bin/sh
printf '%s\\0' "$@"
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder that contains the project's folders, as a checkout does."""
    for name in ("configs", "data", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON)
    (tmp_path / "bin/python3").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _arguments(line: str, script: str) -> list[str]:
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    first, *words = done.stdout.rstrip("\0").split("\0")
    assert first == script
    return words


@pytest.mark.parametrize(
    ("name", "methods"),
    [("market1501", ["base", "wosu", "full"]), ("msmt17", ["full"]), ("cuhk03", ["full"])],
)
def test_every_published_command(
    project: Path,
    name: str,
    methods: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All methods on one data set, and the full method on all data sets and desensitizers."""
    tiny.install(monkeypatch)
    TREES[name](project / "D")
    kind, radius = TYPES[name]
    values = {"D": "D", "set": name, "type": kind, "radius": radius}
    assert train_split.main(_arguments(SPLIT.format(**values), "data/train_split.py")) == 0
    for method in methods:
        more = METHODS[method]
        train = (TRAIN + more).format(**values, method=method)
        _run(f"{train} {SMALL} {NO_WEIGHTS}")
        folder = project / "log" / name / f"{name}-{method}-{kind}"
        mode = "C" if method == "base" else "GCR"
        _check(folder, f"{name}_val", "val", mode)
        assert (folder / "epoch_best_net_C.pth").is_file()
        assert f"=> {TITLES[name]} loaded" in (folder / "log.txt").read_text("utf-8")
        # The training command on the whole data set, with a new OUTPUT_DIR and three more keys.
        test = (TRAIN.replace("_val", "") + more + TEST).format(**values, method=method)
        _run(f"{test} {SMALL} OUTPUT_DIR \"('./log/{name}/{method}-test')\"")
        _check(project / "log" / name / f"{method}-test", name, "test", mode)
    assert "Traceback" not in capsys.readouterr().err


def test_a_shell_runs_the_training(project: Path) -> None:
    """Run the training line in new processes, with a ResNet-18, outside the checkout."""
    python = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'
    (project / "bin/python3").write_text(python)
    trees.market1501(project / "D")
    assert train_split.main(["--dataset_root_dir", "D", "--dataset_name", "market1501"]) == 0
    values = {"D": "D", "set": "market1501", "type": "mosaic", "radius": "24.0", "method": "base"}
    line = f"{(TRAIN + BASE).format(**values)} {SMALL} {NO_WEIGHTS}"
    done = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = project / "log/market1501/market1501-base-mosaic"
    _check(folder, "market1501_val", "val", "C")
    assert (folder / "epoch_best_net_C.pth").is_file()
    log = (folder / "log.txt").read_text("utf-8")
    assert "=> Market1501 loaded" in log and "=> Market1501 loaded" in done.stdout


def _run(line: str) -> None:
    assert command.main(_arguments(line, "tools/main.py")) == 0


def _check(folder: Path, dataset: str, split: str, mode: str) -> None:
    result = tiny.results(folder)
    assert (result["dataset"], result["split"], result["mode"]) == (dataset, split, mode)
    assert result["epoch"] == 1
    rows = {(row["query"], row["gallery"]) for row in result["retrieval"] if row["key"] == "none"}
    assert rows == set(DIRECTIONS)
    keys = {row["key"] for row in result["retrieval"]}
    assert keys == ({"none"} if mode == "C" else {"none", "right", "wrong", "ciphertext"})
    assert len(result["published_row"].split("/")) == 4
    assert (folder / "config.yml").is_file()
