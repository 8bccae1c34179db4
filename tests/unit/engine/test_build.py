"""Building a training: image grids, the folder it may use, and the history it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.loading import load
from engine.build import build_trainer
from engine.checkpoint import NATIVE_NAMES
from engine.trainer import Trainer
from tests.fixtures import tiny
from utils.errors import UserError
from utils.metric_writer import MetricWriter, read_metrics


def _trainer(folder: Path, *overrides: str) -> Trainer:
    config, *words = tiny.arguments(folder, *overrides)
    (folder / "run").mkdir(exist_ok=True)
    return build_trainer(load(config.split("=")[1], words))


def test_the_image_grid_does_not_depend_on_the_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.install(monkeypatch)
    grids = []
    for size in ("1", "2", "16"):  # 3 identities: 3 batches, 2 of which one is short, 1
        validation = _trainer(tmp_path, "TEST.IMS_PER_BATCH", size).validation
        assert validation is not None
        grids.append(validation.draw())
    assert grids[0].size == grids[1].size == grids[2].size
    raw = [grid.crop((0, 0, 40, grid.height)).tobytes() for grid in grids]
    assert raw[0] == raw[1] == raw[2]


def test_a_new_training_keeps_the_numbers_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints were moved away, but metrics.jsonl of the earlier training is there."""
    tiny.install(monkeypatch)
    with MetricWriter(tmp_path / "run") as writer:
        writer.scalars({"loss/total": 1.5}, epoch=7, step=70)
    with _trainer(tmp_path, "MODEL.MODE", "C").writer:
        pass
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [7]


def test_a_resume_does_not_need_start_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.install(monkeypatch)
    run = tiny.trained(tmp_path, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    absent = ("MODEL.PRETRAIN_CHOICE", "imagenet", "MODEL.PRETRAIN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none"):
        _trainer(tmp_path, "MODEL.MODE", "C", *absent, "OUTPUT_DIR", str(tmp_path / "fresh"))
    trainer = _trainer(tmp_path, "MODEL.MODE", "C", *absent, "SOLVER.RESUME", "True")
    trainer.writer.close()
    assert trainer.state.epoch == 1
    saved = tiny.native(run)["networks"]["C"]
    tiny.assert_equal(dict(trainer.networks.reid.state_dict()), dict(saved))


def test_a_refused_resume_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of epoch 2, after the last checkpoint, are deleted only by an accepted resume."""
    tiny.install(monkeypatch)
    run = tiny.trained(tmp_path, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    with MetricWriter(run) as writer:
        writer.scalars({"loss/total": 1.5}, epoch=2, step=12)

    def kept() -> dict[Path, bytes]:
        files = (path for path in run.rglob("*") if path.is_file() and path.name != "log.txt")
        return {path: path.read_bytes() for path in files}

    before = kept()
    with pytest.raises(UserError, match="mode and losses of the checkpoint"):
        _trainer(tmp_path, "MODEL.MODE", "C", "MODEL.CENTER_LOSS", "off", "SOLVER.RESUME", "True")
    assert kept() == before


@pytest.mark.parametrize("name", [*NATIVE_NAMES.values(), "epoch_latest_net_C.pth"])
def test_a_new_training_overwrites_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tiny.install(monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(b"content")
    with pytest.raises(UserError, match=rf"{name} exists.* SOLVER.RESUME True, or choose another"):
        _trainer(tmp_path, "MODEL.MODE", "C")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_resume_needs_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)
    with pytest.raises(UserError, match="SOLVER.RESUME is True, but .* does not exist"):
        _trainer(tmp_path, "MODEL.MODE", "C", "SOLVER.RESUME", "True")
