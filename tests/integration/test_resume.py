"""A training that was interrupted, killed or ran out of disk resumes to the same end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.fixtures import ranks, tiny
from tests.fixtures.devices import mounted
from tools import main as command
from utils.metric_writer import read_metrics

RESUME = ("SOLVER.RESUME", "True")
LATEST = "checkpoint_latest.pth"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        tiny.PERMISSIVE,
        (*tiny.PERMISSIVE, "MODEL.TEACHER_EMA", "0.9", "LOSS.CROSS_TRIPLET", "0.5"),
        ("MODEL.MODE", "C"),
        ("INPUT.TYPE", "noise", "INPUT.RADIUS", "0.3", "MODEL.CENTER_LOSS", "off"),
    ],
    ids=["without", "teacher", "average", "baseline", "noise"],
)
def test_two_epochs_equal_one_epoch_and_a_resume(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    undisturbed = tiny.finished(*overrides)
    parts = tiny.trained(tmp_path, *overrides, "SOLVER.MAX_EPOCHS", "1", output="parts")
    in_force = tiny.native(parts)["training"]["supervision"]["state"]["in_force"]
    assert in_force == ("MODEL.VAL_R1" in overrides)
    assert len(read_metrics(parts / "metrics.jsonl")) > 0
    tiny.run(tmp_path, *overrides, *RESUME, output="parts")
    tiny.assert_same_end(undisturbed, parts)
    log = (parts / "log.txt").read_text("utf-8")
    assert "Resumed after epoch 1 of 2" in log
    assert log.count("Epoch[1] Iteration[1/") == log.count("Epoch[2] Iteration[1/") == 1


class _Dropping(tiny.TinyBackbone):
    """Drops features with the global random numbers, as some timm models do."""

    def forward(self, image: Tensor) -> Tensor:
        return functional.dropout(super().forward(image), 0.3, training=self.training)


@pytest.mark.parametrize("mode", ["memory", "stream"])
def test_layers_that_drop_features_resume_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    tiny.install(monkeypatch, _Dropping)
    baseline = ("MODEL.MODE", "C", "CACHE.MODE", mode)
    undisturbed = tiny.run(tmp_path, *baseline, output="undisturbed")
    tiny.run(tmp_path, *baseline, "SOLVER.MAX_EPOCHS", "1", output="parts")
    parts = tiny.run(tmp_path, *baseline, *RESUME, output="parts")
    tiny.assert_same_end(undisturbed, parts)
    if mode == "stream":
        cached = tiny.run(tmp_path, "MODEL.MODE", "C", output="cached")
        assert tiny.losses(cached) == tiny.losses(parts)


def test_a_resume_without_upgradation_ends_it(tmp_path: Path) -> None:
    run = tiny.trained(tmp_path, *tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "1")
    before = tiny.native(run)["training"]
    assert before["supervision"]["state"]["in_force"] and before["best"]["qualified"]
    tiny.run(tmp_path, *RESUME, "MODEL.VAL_R1", "inf")
    after = tiny.native(run)["training"]
    assert not after["supervision"]["state"]["in_force"]
    assert not after["best"]["qualified"]


def test_packed_weights_are_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    content = tiny.native(run)
    del content["training"]
    torch.save(content, run / LATEST)
    assert command.main(tiny.arguments(tmp_path, *RESUME)) == 2
    error = capsys.readouterr().err
    assert "contains weights only" in error and "MODEL.PRETRAIN_CHOICE self" in error


def test_a_teacher_in_force_changes_the_training() -> None:
    """Otherwise the test above would pass if a resume lost the teacher."""
    runs = {"without": tiny.finished(), "teacher": tiny.finished(*tiny.PERMISSIVE)}
    first, second = (tiny.losses(run) for run in runs.values())
    equal = {epoch: _train(first, epoch) == _train(second, epoch) for epoch in (1, 2)}
    assert equal == {1: True, 2: False}
    assert "Supervision upgraded at epoch 1" in (runs["teacher"] / "log.txt").read_text("utf-8")


def _train(lines: list[dict[str, float]], epoch: int) -> list[dict[str, float]]:
    return [line for line in lines if line["epoch"] == epoch and "loss/total" in line]


def test_resuming_a_finished_training_changes_nothing(tmp_path: Path) -> None:
    run = tiny.run(tmp_path, *tiny.PERMISSIVE)

    def kept() -> tuple[object, ...]:
        result = tiny.results(run)
        del result["versions"]  # the commit may have changed
        return tiny.native(run), tiny.native(run, "best"), tiny.losses(run), result

    before = kept()
    tiny.run(tmp_path, *tiny.PERMISSIVE, *RESUME)
    tiny.assert_equal(before, kept())


def test_changed_values_are_logged(tmp_path: Path) -> None:
    """The log and the last config.yml show the values of each part of a training."""
    tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    run = tiny.run(tmp_path, *RESUME, "SOLVER.BASE_LR", "0.01", "LOSS.GAN", "2")
    log = (run / "log.txt").read_text("utf-8")
    lines_of_changes = [line for line in log.splitlines() if "Values changed" in line]
    assert len(lines_of_changes) == 1
    assert lines_of_changes[0].endswith(
        "Values changed after epoch 1: LOSS.GAN 1.0 -> 2.0, SOLVER.MAX_EPOCHS 1 -> 2, "
        "SOLVER.BASE_LR 0.00035 -> 0.01"
    )
    assert "BASE_LR: 0.01\n" in (run / "config.yml").read_text("utf-8")
    curve = tiny.losses(run)
    rates = {
        line["epoch"]: line["train/learning_rate"] for line in _train(curve, 1) + _train(curve, 2)
    }
    assert rates[2] / rates[1] > 20


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("SOLVER.BASE_LR", "0.01"), "SOLVER.BASE_LR 0.00035 -> 0.01"),
        (("SOLVER.STEPS", "(2, 3)"), "-> (2, 3)"),
        (("SOLVER.WEIGHT_DECAY", "0.1"), "-> 0.1"),
        (("SOLVER.IMS_PER_BATCH", "8"), "SOLVER.IMS_PER_BATCH 16 -> 8"),
    ],
)
def test_a_resume_uses_the_new_values(
    tmp_path: Path, changes: tuple[str, str], expected: str
) -> None:
    tiny.trained(tmp_path, "MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    before = tiny.native(tmp_path / "run")["networks"]["C"]
    run = tiny.run(tmp_path, "MODEL.MODE", "C", *RESUME, *changes)
    log = (run / "log.txt").read_text("utf-8")
    assert expected in log.partition("Values changed after epoch 1: ")[2].splitlines()[0]
    batches = 6 if "SOLVER.IMS_PER_BATCH" in changes else 3
    assert f"Epoch[2] Iteration[{batches}/{batches}]" in log
    rates = {line["epoch"]: line["train/learning_rate"] for line in _train(tiny.losses(run), 2)}
    assert (rates[2] > 0.003) == ("SOLVER.BASE_LR" in changes)
    groups = tiny.native(run)["training"]["optimizers"]["C"]["param_groups"]
    decay = 0.1 if "SOLVER.WEIGHT_DECAY" in changes else 0.0005
    assert all(group["weight_decay"] == decay for group in groups)
    assert not torch.equal(
        before["classifier.weight"], tiny.native(run)["networks"]["C"]["classifier.weight"]
    )


def test_unchanged_values_are_not_logged(tmp_path: Path) -> None:
    tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    run = tiny.run(tmp_path, "SOLVER.MAX_EPOCHS", "1", *RESUME)
    log = (run / "log.txt").read_text("utf-8")
    assert "Resumed after epoch 1" in log
    assert "Values changed" not in log


def test_a_missing_config_does_not_prevent_a_resume(tmp_path: Path) -> None:
    run = tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    (run / "config.yml").unlink()
    tiny.run(tmp_path, *RESUME)
    log = (run / "log.txt").read_text("utf-8")
    assert log.count("What changed at this resume is not known: config file") == 1
    assert (run / "config.yml").is_file()


def test_with_fewer_checkpoints_a_resume_uses_the_last_one(tmp_path: Path) -> None:
    plan = ("SOLVER.MAX_EPOCHS", "3", "SOLVER.CHECKPOINT_PERIOD", "2", *tiny.PERMISSIVE)
    undisturbed = tiny.finished(*plan)
    process = tiny.start(tmp_path, *plan, output="parts", slow_writes_s=0.05)
    _wait_until(process, lambda: tiny.has_epoch(tmp_path / "parts", 3))
    _kill(process)
    assert tiny.native(tmp_path / "parts")["epoch"] == 2
    tiny.run(tmp_path, *plan, *RESUME, output="parts")
    tiny.assert_same_end(undisturbed, tmp_path / "parts")


def test_killed_during_a_save(tmp_path: Path) -> None:
    """The old file is complete, and the half-written new one is removed by the resume."""
    undisturbed = tiny.finished(*tiny.PERMISSIVE)
    process = tiny.start(tmp_path, *tiny.PERMISSIVE, output="parts", slow_writes_s=0.4)
    parts = tmp_path / "parts"
    _wait_until(process, lambda: tiny.has_epoch(parts, 1))
    _wait_until(process, lambda: bool(list(parts.glob(".checkpoint_latest.*"))))
    _kill(process)
    assert list(parts.glob(".checkpoint_latest.*"))
    assert tiny.native(parts)["epoch"] == 0
    image = parts / "pictures" / f".epoch_002.{process.pid}-0123abcd.tmp.png"
    image.write_bytes(b"half")  # left by a kill during the write of an image
    tiny.run(tmp_path, *tiny.PERMISSIVE, *RESUME, output="parts")
    tiny.assert_same_end(undisturbed, parts)
    assert not list(parts.rglob(".*"))


def test_killed_between_native_and_official_files(tmp_path: Path) -> None:
    undisturbed = tiny.finished()
    parts = shutil.copytree(undisturbed, tmp_path / "parts")
    old = tiny.finished("SOLVER.MAX_EPOCHS", "1")
    for letter in ("C", "D2"):
        name = f"epoch_latest_net_{letter}.pth"
        (parts / name).write_bytes((old / name).read_bytes())
    tiny.run(tmp_path, *RESUME, output="parts")
    tiny.assert_same_end(undisturbed, parts)


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, kills: int) -> None:
    overrides = (*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3")
    undisturbed = tiny.finished(*overrides)
    parts, rng = tmp_path / "parts", random.Random(kills)
    count = 0
    while count < kills:
        process = tiny.start(tmp_path, *overrides, *_resuming(parts), output="parts")
        process.join(rng.uniform(0.2, 2.0))
        if process.exitcode is not None:  # finished before the kill: try again
            assert process.exitcode == 0, (tmp_path / "terminal.txt").read_text("utf-8")
            tiny.assert_same_end(undisturbed, parts)
            shutil.rmtree(parts)
            continue
        _kill(process)
        count += 1
        if (parts / LATEST).exists():
            tiny.native(parts)  # readable after every kill
    tiny.run(tmp_path, *overrides, *_resuming(parts), output="parts")
    tiny.assert_same_end(undisturbed, parts)


def test_interrupted_by_ctrl_c(tmp_path: Path) -> None:
    undisturbed = tiny.finished()
    process = tiny.start(tmp_path, output="parts", slow_writes_s=0.1)
    _wait_until(process, lambda: tiny.has_epoch(tmp_path / "parts", 1))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(ranks.HANGS_S)
    assert process.exitcode == 130
    terminal = (tmp_path / "terminal.txt").read_text("utf-8")
    assert "SOLVER.RESUME True" in terminal
    assert "Traceback" not in terminal
    tiny.run(tmp_path, *RESUME, output="parts")
    tiny.assert_same_end(undisturbed, tmp_path / "parts")


@pytest.mark.parametrize("room_kib", [900, 1400])
def test_disk_full_during_training(tmp_path: Path, room_kib: int) -> None:
    """One error line; with more room the run resumes to the same end."""
    overrides = (*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3")
    undisturbed = tiny.finished(*overrides)
    with mounted(tmp_path / "device", f"size={room_kib}k") as device:
        process = tiny.start(tmp_path, *overrides, output="device/run")
        process.join(ranks.HANGS_S)
        terminal = (tmp_path / "terminal.txt").read_text("utf-8")
        assert process.exitcode not in (0, None), terminal
        assert "Traceback" not in terminal
        errors = [line for line in terminal.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, terminal
        assert "No space left on device" in errors[0]
        resumable = (device / "run" / LATEST).exists()
        if resumable:
            tiny.native(device / "run")
        subprocess.run(["mount", "-o", "remount,size=64m", str(device)], check=True)
        more = RESUME if resumable else ()
        tiny.run(tmp_path, *overrides, *more, output="device/run")
        tiny.assert_same_end(undisturbed, device / "run")


def _resuming(folder: Path) -> tuple[str, ...]:
    return RESUME if (folder / LATEST).exists() else ()


def _wait_until(process: BaseProcess, condition: object) -> None:
    assert callable(condition)
    give_up = time.monotonic() + ranks.HANGS_S
    while not condition():
        assert process.exitcode is None, "the run ended before it could be disturbed"
        assert time.monotonic() < give_up
        time.sleep(0.002)


def _kill(process: BaseProcess) -> None:
    process.kill()
    process.join()
