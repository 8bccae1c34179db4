"""Experiment trackers: with a stand-in by default, and with the real packages in slow tests.

The real packages take a minute to install and seconds to import, and only their offline modes can
be tested. So the default run needs neither of them.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from utils import metric_writer
from utils.errors import UserError
from utils.files import WriteError
from utils.metric_writer import RUNS_NAME, MetricWriter, Trackers, read_metrics

CONFIG = {"SOLVER.BASE_LR": 0.5, "MODEL.VAL_R1": math.inf, "SOLVER.STEPS": (1, 2), "A": ""}


class Recorder:
    """A tracker that keeps what it receives."""

    opened: list[Recorder] = []

    def __init__(self, folder: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        self.place, self.config = str(folder), config
        self.run_id = run_id or f"run{len(self.opened)}"
        self.received: list[tuple[dict[str, float], int]] = []
        self.failed: bool | None = None
        self.opened.append(self)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.received.append((dict(values), step))

    def close(self, *, failed: bool) -> None:
        self.failed = failed


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Replace Weights & Biases; return the trackers that are opened."""
    monkeypatch.setattr(Recorder, "opened", [])
    monkeypatch.setitem(metric_writer.TRACKERS, "wandb", Recorder)
    monkeypatch.setattr(metric_writer, "package", lambda name: None)
    return Recorder.opened


def writer(folder: Path, *, resume_epoch: int | None = None) -> MetricWriter:
    runs = Trackers(("wandb",), folder, CONFIG, resumes=resume_epoch is not None)
    return MetricWriter(folder, resume_epoch=resume_epoch, tensorboard=False, trackers=runs)


def test_it_receives_configuration_numbers_and_end(tmp_path: Path, opened: list[Recorder]) -> None:
    with writer(tmp_path) as metrics:
        metrics.scalars({"loss/total": 1.5, "loss/bad": math.nan}, epoch=1, step=7)
    (run,) = opened
    assert run.config == CONFIG
    assert run.received == [({"loss/total": 1.5}, 7)]
    assert run.failed is False
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "runs").exists()


def test_a_training_that_fails_is_marked(tmp_path: Path, opened: list[Recorder]) -> None:
    with pytest.raises(KeyboardInterrupt), writer(tmp_path):
        raise KeyboardInterrupt
    assert opened[0].failed is True


def test_a_training_that_cannot_start_leaves_no_run_open(
    tmp_path: Path, opened: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    runs = Trackers(("wandb",), tmp_path, CONFIG, resumes=False)
    with pytest.raises(UserError, match="needs the package tensorboard"):
        MetricWriter(tmp_path, trackers=runs)
    assert opened == []
    (tmp_path / RUNS_NAME).mkdir()  # so that the ids of the runs cannot be written
    with pytest.raises(WriteError), writer(tmp_path):
        pass
    assert opened[0].failed is True


def test_a_resume_continues_the_run_and_repeats_no_step(
    tmp_path: Path, opened: list[Recorder]
) -> None:
    with writer(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.scalars({"loss": 1.0}, epoch=step, step=step)
    with writer(tmp_path, resume_epoch=1) as metrics:
        for step in (2, 3, 4):
            metrics.scalars({"loss": 1.0}, epoch=step, step=step)
    first, second = opened
    assert second.run_id == first.run_id
    # Step 3 may have been sent in part only.
    assert [step for _, step in second.received] == [3, 4]
    with writer(tmp_path):
        assert opened[-1].run_id != first.run_id  # a new training


@pytest.mark.parametrize("content", ["", "[]", "{", '{"mlflow": "x"}'])
def test_without_a_recorded_run_a_resume_starts_one(
    tmp_path: Path, opened: list[Recorder], content: str
) -> None:
    (tmp_path / RUNS_NAME).write_text(content)
    with writer(tmp_path, resume_epoch=1):
        assert opened[0].run_id == "run0"
    assert json.loads((tmp_path / RUNS_NAME).read_text())["wandb"] == "run0"


@pytest.mark.parametrize("method", ["__init__", "scalars", "close"])
def test_a_tracker_that_fails_is_one_warning(
    tmp_path: Path,
    opened: list[Recorder],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(Recorder, method, fail)
    with caplog.at_level(logging.WARNING), writer(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.scalars({"loss": 1.0}, epoch=1, step=step)
    (warning,) = caplog.messages
    assert warning == (
        "wandb failed and receives no more numbers, metrics.jsonl is complete: no route to host"
    )
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_error(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=rf"TRACKERS {name} needs .* run `pip install -e '.\[{name}\]'`"
    ):
        Trackers((name,), tmp_path, CONFIG, resumes=False)
    assert not list(tmp_path.iterdir())


def _needs(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(
        missing, reason=f"{name} is not installed: pip install -e '.[{name}]'"
    )


@pytest.mark.slow
@_needs("wandb")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for resumes in (False, True):
        runs = Trackers(("wandb",), tmp_path, CONFIG, resumes=resumes)
        runs.open()
        runs.scalars({"eval/raw->protected/rank1": 0.5}, 7)
        runs.close(failed=False)
        ids.append(json.loads((tmp_path / RUNS_NAME).read_text())["wandb"])
    assert ids[0] == ids[1]
    (file, *_) = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    content = file.read_bytes()
    assert file.name == f"run-{ids[0]}.wandb"
    assert b"eval/raw->protected/rank1" in content and b"SOLVER.BASE_LR" in content


@pytest.mark.slow
@_needs("mlflow")
def test_mlflow_in_a_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for step, resumes in ((7, False), (8, True)):
        runs = Trackers(("mlflow",), tmp_path, CONFIG, resumes=resumes)
        runs.open()
        runs.scalars({"eval/raw->protected/rank1": step / 10}, step)
        runs.close(failed=not resumes)
    client = MlflowClient()
    run_id = json.loads((tmp_path / RUNS_NAME).read_text())["mlflow"]
    history = client.get_metric_history(run_id, "eval/raw to protected/rank1")
    assert [(point.step, point.value) for point in history] == [(7, 0.7), (8, 0.8)]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in CONFIG.items()}
