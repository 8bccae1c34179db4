"""A wrong input gives one line on stderr and a non-zero exit code, and loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.loading import load
from engine.build import build_trainer
from engine.train_step import JointStep, StepOutput
from tests.fixtures import tiny, trees
from tests.fixtures.devices import mounted
from tests.fixtures.paths import ROOT
from tools import main as command


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


def _fails(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str) -> str:
    """Run, expect one error line with these words, and return it."""
    capsys.readouterr()
    code = command.main(argv)
    error = capsys.readouterr().err
    assert code != 0
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error
    for word in words:
        assert word in error, error
    return error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("MODEL.MDOE", "C"), ("MODEL.MDOE", "MODEL.MODE")),
        (("SOLVER.MAX_EPOCHS", "many"), ("SOLVER.MAX_EPOCHS", "'many'")),
        (("INPUT.TYPE", "mosiac"), ("INPUT.TYPE is 'mosiac'", "blur, mosaic, noise")),
        (("SOLVER.BASE_LR", "-1"), ("SOLVER.BASE_LR",)),
        (("DATASETS.NAMES", "market1502"), ("market1502", "market1501")),
        (("DATASETS.NAMES", "market1501"), ("Market1501",)),
        (("DATASETS.NAMES", "folder:/not/there"), ("/not/there",)),
        (("SOLVER.IMS_PER_BATCH", "64"), ("12 identities", "SOLVER.IMS_PER_BATCH")),
        (("MODEL.PRETRAIN_CHOICE", "self"), ("MODEL.PRETRAIN_DIR",)),
        (("SOLVER.RESUME", "True"), ("does not exist", "leave SOLVER.RESUME out")),
        (("OUTPUT_DIR",), ("OUTPUT_DIR",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_values(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    _fails(capsys, tiny.arguments(tmp_path, *overrides), *words)
    assert not list(tmp_path.glob("run/*.pth"))


def test_several_problems_are_reported_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny.arguments(tmp_path, "MODEL.MDOE", "C", "INPUT.TYPE", "mosiac")
    assert command.main(argv) != 0
    error = capsys.readouterr().err
    assert error.startswith("error: 2 problems")
    assert "MODEL.MDOE" in error
    assert "mosiac" in error


def test_a_missing_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    _fails(capsys, ["--config_file=configs/AGW.yml"], "configs/AGW.yml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fails(capsys, tiny.arguments(tmp_path, "MODEL.DEVICE", "cuda"), "MODEL.DEVICE", "cpu or auto")


def test_output_dir_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a diary", encoding="utf-8")
    _fails(capsys, tiny.arguments(tmp_path), str(tmp_path / "run"))
    assert (tmp_path / "run").read_text("utf-8") == "a diary"


def test_output_dir_is_read_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    if os.geteuid():
        folder.mkdir(mode=0o555)
        _fails(capsys, tiny.arguments(tmp_path), str(folder), "you may write to")
        return
    # Root may write anywhere but on a read-only device.
    with mounted(folder, "ro"):
        _fails(capsys, tiny.arguments(tmp_path), str(folder), "choose a folder you may write to")


def test_output_dir_on_a_device_without_room(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = tiny.arguments(tmp_path, "OUTPUT_DIR", str(small_disk / "run"))
    _fails(capsys, argv, "No space left on device")
    assert not list(small_disk.glob("run/**/*.tmp*"))


def test_upgradation_without_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.market1501(tmp_path / "sets")
    data = ("DATASETS.NAMES", "market1501", "DATASETS.ROOT_DIR", str(tmp_path / "sets"))
    argv = tiny.arguments(tmp_path, *data, "MODEL.VAL_R1", "0.75")
    _fails(capsys, argv, "MODEL.VAL_R1", "no validation split", "market1501_val", "train_split.py")


def test_the_baseline_needs_no_validation(tmp_path: Path) -> None:
    trees.market1501(tmp_path / "sets")
    data = ("DATASETS.NAMES", "market1501", "DATASETS.ROOT_DIR", str(tmp_path / "sets"))
    argv = tiny.arguments(tmp_path, *data, "MODEL.VAL_R1", "0.75", "MODEL.MODE", "C")
    (tmp_path / "run").mkdir()
    config, *words = argv
    assert build_trainer(load(config.split("=")[1], words)).validation is None


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    names = [path for path in run.rglob("*") if path.is_file() and path.name != "log.txt"]
    before = {path: path.read_bytes() for path in names}
    log = (run / "log.txt").read_text("utf-8")
    argv = tiny.arguments(tmp_path, "SOLVER.BASE_LR", "0.1")
    _fails(capsys, argv, "exists", "SOLVER.RESUME True", "another OUTPUT_DIR")
    assert before == {path: path.read_bytes() for path in names}
    assert (run / "log.txt").read_text("utf-8").startswith(log)
    for path in run.glob("checkpoint_*.pth"):  # published weights have official files only
        path.unlink()
    _fails(capsys, argv, "exists", "epoch_best_net_C.pth")


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    else:
        data = bytearray(b"<html>404</html>")
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign"])
def test_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    run = tiny.trained(tmp_path, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    damaged = run / "checkpoint_latest.pth"
    _damage(damaged, how)
    left = damaged.read_bytes()
    base = ("MODEL.MODE", "C")
    _fails(capsys, tiny.arguments(tmp_path, *base, "SOLVER.RESUME", "True"), str(damaged))
    assert damaged.read_bytes() == left
    _damage(run / "checkpoint_best.pth", how)
    choice = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(run))
    argv = tiny.arguments(tmp_path, *base, "TEST.EVALUATE_ONLY", "on", *choice, output="alone")
    _fails(capsys, argv, str(run / "checkpoint_best.pth"))


def test_a_checkpoint_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.trained(tmp_path, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    evaluate = ("TEST.EVALUATE_ONLY", "on", "MODEL.PRETRAIN_CHOICE", "self")
    folder = ("MODEL.PRETRAIN_DIR", str(run))
    # A baseline's folder, evaluated as the joint model.
    argv = tiny.arguments(tmp_path, *evaluate, *folder, output="alone")
    _fails(capsys, argv, str(run), "no network G, G_R", "in mode C", "MODEL.MODE")
    # Another architecture: recorded by a native file, and found from shapes.
    wider = tiny.arguments(
        tmp_path, "MODEL.MODE", "C", *evaluate, *folder, "MODEL.LAST_STRIDE", "2", output="alone"
    )
    _fails(capsys, wider, "MODEL.LAST_STRIDE 1 (now 2)")
    joint = tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1", output="joint")
    for path in joint.glob("checkpoint_*.pth"):
        path.unlink()
    folder = ("MODEL.PRETRAIN_DIR", str(joint))
    argv = tiny.arguments(tmp_path, *evaluate, *folder, "MODEL.NGF", "4", output="alone")
    _fails(capsys, argv, str(joint), "(2, 3, 4, 4)", "(4, 3, 4, 4)", "MODEL.NGF")
    nowhere = ("MODEL.PRETRAIN_DIR", str(tmp_path / "nowhere"))
    argv = tiny.arguments(tmp_path, *evaluate, *nowhere, output="alone")
    _fails(capsys, argv, "nowhere", "is not a folder")
    # A resume in another mode.
    argv = tiny.arguments(tmp_path, "SOLVER.RESUME", "True")
    _fails(capsys, argv, "contains networks C", "G, G_R, C, D1, D2")


def test_a_nan_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is named, its batch saved, and the run can be resumed from the last checkpoint."""
    whole = tiny.finished()
    steps = len({line["step"] for line in tiny.losses(whole) if line["epoch"] == 1})
    step = JointStep.__call__
    calls = 0

    def broken(self: JointStep, batch: object) -> StepOutput:
        nonlocal calls
        calls += 1
        out = step(self, batch)  # type: ignore[arg-type]
        bad = {"recovery": torch.tensor(float("nan"))} if calls == steps + 2 else {}
        return StepOutput(out.losses | bad, out.total, out.accuracy)

    with monkeypatch.context() as patch:
        patch.setattr(JointStep, "__call__", broken)
        _fails(
            capsys,
            tiny.arguments(tmp_path),
            "recovery = nan",
            f"step {steps + 2}",
            "nan_batch.pth",
            "SOLVER.RESUME True",
        )
    run = tmp_path / "run"
    kept = torch.load(run / "nan_batch.pth", weights_only=True)
    assert kept["step"] == steps + 2
    assert kept["raw"].shape == kept["desensitized"].shape == (16, 3, 32, 32)
    assert kept["losses"]["recovery"] != kept["losses"]["recovery"]
    assert tiny.native(run)["epoch"] == 1
    tiny.run(tmp_path, "SOLVER.RESUME", "True")
    (run / "nan_batch.pth").unlink()
    tiny.assert_same_end(whole, run)


def test_a_network_with_nan_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    content = tiny.native(run, "best")
    for value in content["networks"]["G"].values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    torch.save(content, run / "checkpoint_best.pth")
    choice = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(run))
    argv = tiny.arguments(tmp_path, "TEST.EVALUATE_ONLY", "on", *choice, output="alone")
    _fails(capsys, argv, "NaN")


def test_the_command_itself(tmp_path: Path) -> None:
    """In a process: exit code, streams, and no traceback."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/main.py"), "MODEL.MDOE", "C"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: MODEL.MDOE")
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_folder_of_attacks_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}", "utf-8")
    assert command.main(tiny.arguments(tmp_path)) == 2
    assert "contains attacks" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.json"]
