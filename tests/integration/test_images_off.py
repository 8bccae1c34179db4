"""EVAL.IMAGES off and `tools/export.py --pack`: no images of the data set leave the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.api import Anonymizer
from engine.report import DIRECTIONS
from engine.train_step import JointStep, StepOutput
from tests.fixtures import tiny
from tools import export
from tools import main as command

ON = ("SOLVER.MAX_EPOCHS", "1", "EVAL.REPORT", "on")
OFF = ("EVAL.IMAGES", "off", "SOLVER.MAX_EPOCHS", "1")
WARNING = "OUTPUT_DIR will contain images of the data set"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


def _images(folder: Path) -> list[Path]:
    """Return the files below a folder that contain a PNG or JPEG image, also in base64."""
    marks = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"data:image/png;base64")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(mark in path.read_bytes() for mark in marks)]


def test_no_file_of_a_run_contains_an_image(tmp_path: Path) -> None:
    off = tiny.run(tmp_path, *ON, *OFF)
    assert (off / "report.html").is_file()
    assert _images(off) == []
    names = {path.name for path in _images(tiny.finished(*ON))}
    ranks = {f"ranks_{'-'.join(direction)}.png" for direction in DIRECTIONS}
    assert {"pictures.png", "epoch_001.png", "strips.png", "report.html", *ranks} <= names
    assert any(name.startswith("events.") for name in names)


def test_the_batch_of_a_nan_loss_has_no_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = JointStep.__call__

    def broken(self: JointStep, batch: object) -> StepOutput:
        output = step(self, batch)  # type: ignore[arg-type]
        losses = output.losses | {"recovery": torch.tensor(float("nan"))}
        return StepOutput(losses, output.total, output.accuracy)

    monkeypatch.setattr(JointStep, "__call__", broken)
    assert command.main(tiny.arguments(tmp_path, *OFF)) == 1
    saved = torch.load(tmp_path / "run" / "nan_batch.pth", weights_only=True)
    assert set(saved) == {"step", "losses", "label", "index"}


def test_real_people_give_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    short = ("SOLVER.MAX_EPOCHS", "1", "MODEL.MODE", "C")
    tiny.run(tmp_path, *short)
    assert WARNING not in caplog.text
    monkeypatch.setattr("tools.lib.run.is_of_real_people", lambda name: True)
    run = tiny.run(tmp_path, *short, output="real")
    assert (run / "log.txt").read_text("utf-8").count(WARNING) == 1
    run = tiny.run(tmp_path, *short, *OFF, output="off")
    assert WARNING not in (run / "log.txt").read_text("utf-8")


@pytest.mark.parametrize("mode", ["GCR", "C"])
def test_a_packed_run_is_a_checkpoint_without_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    baseline = ("MODEL.MODE", "C") if mode == "C" else ()
    run = tiny.finished(*baseline, "SOLVER.MAX_EPOCHS", "1")
    packed = tmp_path / "packed"
    assert export.main([str(run), str(packed), "--pack"]) == 0
    assert sorted(path.name for path in packed.iterdir()) == [
        "calibration.json", "checkpoint_best.pth", "config.yml", "results.json",
    ]  # fmt: skip
    assert _images(packed) == []
    source, copy = tiny.native(run, "best"), tiny.native(packed, "best")
    tiny.assert_equal(copy, source)
    assert "training" not in copy
    evaluate = ("TEST.EVALUATE_ONLY", "on", "MODEL.PRETRAIN_CHOICE", "self", "MODEL.MODE", mode)
    again = tiny.run(
        tmp_path, *evaluate, "MODEL.PRETRAIN_DIR", str(packed), "EVAL.SPLIT", "val", output="again"
    )
    assert tiny.results(again)["retrieval"][:2] == tiny.results(run)["retrieval"][:2]
    if mode == "GCR":
        assert Anonymizer.from_checkpoint(packed, device="cpu").size == (32, 32)
    assert export.main([str(run), str(packed), "--pack"]) == 2
    assert "checkpoint_best.pth" in capsys.readouterr().err
    # Nothing of this run is left if another one, without best weights, replaces it.
    other = tiny.trained(tmp_path, *baseline, "SOLVER.MAX_EPOCHS", "1", output="other")
    for path in (*other.glob("*_best*"), other / "calibration.json"):
        path.unlink()
    assert export.main([str(other), str(packed), "--pack", "--overwrite"]) == 0
    assert sorted(path.name for path in packed.iterdir()) == [
        "checkpoint_latest.pth",
        "config.yml",
        "results.json",
    ]
    assert export.main([str(run), str(packed), "--pack", "--overwrite"]) == 0
    assert export.main([str(packed), str(packed), "--pack", "--overwrite"]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main([str(run), str(packed), "--pack", "--networks", "anonymize", "--overwrite"])
