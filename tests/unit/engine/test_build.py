"""What is built from a configuration: a sheet of any batch size, and a history that is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.loading import load
from engine.build import build_trainer
from engine.trainer import Trainer
from tests.fixtures import tiny
from utils.errors import UserError
from utils.metric_writer import MetricWriter, read_metrics


def _trainer(folder: Path, *overrides: str) -> Trainer:
    config, *words = tiny.arguments(folder, *overrides)
    (folder / "run").mkdir(exist_ok=True)
    return build_trainer(load(config.split("=")[1], words))


def test_the_sheet_does_not_depend_on_the_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.install(monkeypatch)
    sheets = []
    for size in ("1", "2", "16"):  # three people: three batches, two of which one is short, one
        validation = _trainer(tmp_path, "TEST.IMS_PER_BATCH", size).validation
        assert validation is not None
        sheets.append(validation.draw())
    assert sheets[0].size == sheets[1].size == sheets[2].size
    raw = [sheet.crop((0, 0, 40, sheet.height)).tobytes() for sheet in sheets]
    assert raw[0] == raw[1] == raw[2]


def test_a_new_training_drops_no_numbers_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints were moved away; what it wrote is still somebody's."""
    tiny.install(monkeypatch)
    with MetricWriter(tmp_path / "run") as writer:
        writer.scalars({"loss/total": 1.5}, epoch=7, step=70)
    with _trainer(tmp_path, "MODEL.MODE", "C").writer:
        pass
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [7]


def test_a_resume_needs_no_start_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)
    run = tiny.run(tmp_path, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    absent = ("MODEL.PRETRAIN_CHOICE", "imagenet", "MODEL.PRETRAIN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none"):
        _trainer(tmp_path, "MODEL.MODE", "C", *absent, "OUTPUT_DIR", str(tmp_path / "fresh"))
    trainer = _trainer(tmp_path, "MODEL.MODE", "C", *absent, "SOLVER.RESUME", "True")
    trainer.writer.close()
    assert trainer.state.epoch == 1
    saved = tiny.native(run)["networks"]["C"]
    tiny.assert_equal(dict(trainer.step.nets.reid.state_dict()), dict(saved))


def test_a_refused_resume_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after epoch 2, before its checkpoint: its numbers wait for a resume that is right."""
    tiny.install(monkeypatch)
    run = tiny.run(tmp_path, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    with MetricWriter(run) as writer:
        writer.scalars({"loss/total": 1.5}, epoch=2, step=12)

    def kept() -> dict[Path, bytes]:
        files = (path for path in run.rglob("*") if path.is_file() and path.name != "log.txt")
        return {path: path.read_bytes() for path in files}

    before = kept()
    with pytest.raises(UserError, match="MODEL.CENTER_LOSS"):
        _trainer(tmp_path, "MODEL.MODE", "C", "MODEL.CENTER_LOSS", "off", "SOLVER.RESUME", "True")
    assert kept() == before
