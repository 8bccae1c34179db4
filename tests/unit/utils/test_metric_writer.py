from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.errors import UserError
from utils.files import WriteError
from utils.metric_writer import MetricWriter, read_metrics


def write(folder: Path, epochs: range, **resume: int) -> None:
    with MetricWriter(folder, **resume) as writer:
        for epoch in epochs:
            writer.scalars({"loss/triplet": 1 / epoch}, epoch=epoch, step=10 * epoch)


def test_lines_and_tensorboard_contain_the_same_numbers(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.scalars({"eval/raw->protected/rank1": 0.5, "eval/mAP": 0.25}, epoch=1, step=7)
        writer.picture("pictures/raw", torch.zeros(3, 8, 4, dtype=torch.uint8), step=7)
        writer.flush()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"epoch": 1, "step": 7, "eval/raw->protected/rank1": 0.5, "eval/mAP": 0.25}
    ]
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"eval/raw->protected/rank1", "eval/mAP"}
    assert [(e.step, e.value) for e in events.Scalars("eval/mAP")] == [(7, 0.25)]
    assert events.Tags()["images"] == ["pictures/raw"]


def test_resume_removes_later_lines_and_appends(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "st')  # killed in the middle of a line
    write(tmp_path, range(3, 6), resume_epoch=2, resume_step=20)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5]
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/triplet")] == [10, 20, 30, 40, 50]


def test_a_damaged_line_does_not_prevent_a_resume(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff" + lines[1], *lines[2:]]))
    assert [record["epoch"] for record in read_metrics(path)] == [1, 3]
    write(tmp_path, range(3, 4), resume_epoch=2, resume_step=20)
    assert [record["epoch"] for record in read_metrics(path)] == [1, 3]


def test_a_second_run_in_a_folder_appends_after_a_cut_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2')
    write(tmp_path, range(1, 3))
    assert [record["epoch"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2]


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        values = {"a": math.nan, "b": math.inf, "c": torch.tensor(2.0).item()}
        writer.scalars(values, epoch=1, step=1)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == (None, None, 2.0)


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(WriteError, match="run"):
        MetricWriter(tmp_path / "run")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(WriteError, match="choose another output folder"):
        MetricWriter(tmp_path)


def test_a_full_disk_is_named_and_whole_lines_stay_readable(small_disk: Path) -> None:
    with pytest.raises(WriteError, match="free some space"), MetricWriter(small_disk) as writer:
        for step in range(10_000):
            writer.scalars({"loss/triplet": 1.0, "loss/center": 2.0}, epoch=1, step=step)
    assert len(read_metrics(small_disk / "metrics.jsonl")) > 100


def test_a_full_disk_in_tensorboards_thread_is_reported_once(
    small_disk: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(WriteError, match="free some space"), MetricWriter(small_disk) as writer:
        for step in range(100):
            writer.picture("noise", torch.rand(3, 64, 64), step=step)
            writer.flush()
    assert capfd.readouterr() == ("", "")


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="a training needs the package tensorboard"):
        MetricWriter(tmp_path)
