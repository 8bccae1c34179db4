"""Several processes on one run: they end like one process does, and none waits for one gone."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from engine.train_step import StepOutput
from engine.vault.keyring import Keyring
from solver import build as solver_build
from tests.fixtures import ranks, tiny
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import PEOPLE, make_scene
from tests.integration.test_evaluate_only import _evaluation
from tools import protect
from utils.files import WriteError
from utils.metric_writer import read_metrics

RESUME = ("SOLVER.RESUME", "True")
LATEST = "checkpoint_latest.pth"
# What a fault may take: far more than it does, less than the minute that is promised.
PROMPTLY_S = 50


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


def _damped(patch: pytest.MonkeyPatch) -> None:
    """Let Adam's step be proportional to small gradients.

    It divides a gradient by its own size, and so takes full steps along those that are nothing but
    rounding errors (a bias before a batch norm has them): curves would part for no reason.
    """
    adam = solver_build.Adam
    patch.setattr(solver_build, "Adam", lambda *a, **k: adam(*a, **k, eps=1e-2))


def test_two_processes_follow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, upgradation, validation: up to rounding, over a change of the target in epoch 2.

    One process parts from itself at the same pace if its weights are changed by 1e-7: in epoch 2 a
    rounding error of an adversarial loss grows some threefold with every step. By the last one the
    total had moved by up to 2e-4 and a part of it by 8e-3 (three such changes, torch 2.4 and 2.14);
    another target moves the total by four tenths.
    """
    plan = (*tiny.PERMISSIVE, "SOLVER.BASE_LR", "0.0001", "TEST.IMS_PER_BATCH", "4")
    two = ranks.run_program(tmp_path, *plan, output="two", prepare=_damped)
    _damped(monkeypatch)
    one = tiny.run(tmp_path, *plan, output="one")
    curves = tiny.losses(one), tiny.losses(two)
    assert [list(line) for line in curves[0]] == [list(line) for line in curves[1]]
    for expected, got in zip(*curves, strict=True):
        for name, value in expected.items():
            if name.startswith("loss/"):
                close = 1e-5 if expected["epoch"] == 1 else 5e-4 if name == "loss/total" else 2e-2
                assert math.isclose(got[name], value, rel_tol=close), (expected["step"], name)
    first, last = (tiny.losses(two)[index]["loss/total"] for index in (0, -2))
    assert abs(last - first) > 1e-2 * first  # it learns: the curves are no straight lines
    assert tiny.native(two)["training"]["supervision"]["state"]["in_force"]
    assert "Supervision upgraded at epoch 1" in (two / "log.txt").read_text("utf-8")
    assert tiny.results(two)["versions"]["processes"] == "2"
    assert ranks.terminal(tmp_path, 1).count("Epoch") == 0  # the first speaks for all
    assert not list(two.glob(".*"))


def test_evaluation_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    """To the last bit; 5 does not divide the images, and one of three processes gets none."""
    trained = tiny.run(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    plan = _evaluation(trained, "TEST.IMS_PER_BATCH", "5", "EVAL.DETAILS", "on")
    one = tiny.run(tmp_path, *plan, output="one")
    few = ("TEST.IMS_PER_BATCH", "10")
    one_in_tens = tiny.run(tmp_path, *plan, *few, output="one_in_tens")
    two = ranks.run_program(tmp_path, *plan, output="two")
    three = ranks.run_program(tmp_path, *plan, *few, output="three", size=3)
    for alone, together in ((one, two), (one_in_tens, three)):
        results = [tiny.results(run) for run in (alone, together)]
        for key in results[0]:
            if key != "versions":
                assert results[0][key] == results[1][key], key
        for name in ("per_query.csv", "details.json", "pictures.png"):
            assert (alone / name).read_bytes() == (together / name).read_bytes(), name


def _wait_until(condition: Callable[[], bool], processes: list[BaseProcess]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert all(process.exitcode is None for process in processes), "ended before its time"
        assert time.monotonic() < give_up
        time.sleep(0.005)


def _has_epoch(folder: Path, epoch: int) -> bool:
    return any(line["epoch"] >= epoch for line in read_metrics(folder / "metrics.jsonl"))


def _slow(patch: pytest.MonkeyPatch) -> None:
    """Leave time to disturb a run."""
    total = StepOutput.numbers

    def numbers(self: StepOutput) -> Any:
        time.sleep(0.05)
        return total(self)

    patch.setattr(StepOutput, "numbers", numbers)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_run_and_a_restart_ends_like_it_had_not(
    tmp_path: Path, victim: int
) -> None:
    plan = (*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3")
    parts = tmp_path / "parts"
    processes = ranks.start_program(tmp_path, *plan, output="parts", prepare=_slow)
    _wait_until(lambda: _has_epoch(parts, 2), processes)
    processes[victim].kill()
    codes = ranks.wait(processes, PROMPTLY_S)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, ranks.terminal(tmp_path)
    assert tiny.native(parts)["epoch"] in (1, 2)
    if victim == 1:
        assert "rank 1 ended without a word" in (parts / "log.txt").read_text("utf-8")
        assert "Traceback" not in ranks.terminal(tmp_path)
    # as torchrun --max-restarts does it: the same command again
    ranks.run_program(tmp_path, *plan, output="parts", restarts=1)
    assert "Restarted by torchrun" in (parts / "log.txt").read_text("utf-8")
    whole = ranks.run_program(tmp_path, *plan, output="whole")
    tiny.assert_same_end(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_restarts_a_killed_process(tmp_path: Path, restarts: int) -> None:
    """With torchrun itself: it names who was killed, or goes on from the last checkpoint."""
    plan = (*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3")
    options = ("--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}")
    script = str(ROOT / "tests/fixtures/tiny_program.py")
    argv = tiny.arguments(tmp_path, *plan, output="parts")
    parts = tmp_path / "parts"
    with (tmp_path / "terminal.txt").open("w") as stream:
        agent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, script, *argv],
            stdout=stream, stderr=stream, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        give_up = time.monotonic() + 120
        while not _has_epoch(parts, 2):
            assert agent.poll() is None, (tmp_path / "terminal.txt").read_text("utf-8")
            assert time.monotonic() < give_up
            time.sleep(0.01)
        victim = _children(agent.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        code = agent.wait(120)
    text = (tmp_path / "terminal.txt").read_text("utf-8")
    assert code == (0 if restarts else 1), text
    if not restarts:
        assert "exitcode  : -9" in text.replace(": -9 ", ": -9")
        assert "ended without a word" in (parts / "log.txt").read_text("utf-8")
        ranks.run_program(tmp_path, *plan, *RESUME, output="parts")
    whole = ranks.run_program(tmp_path, *plan, output="whole")
    tiny.assert_same_end(whole, parts)


@pytest.mark.slow
def test_machines_restart_together(tmp_path: Path) -> None:
    """Two agents of torchrun, each a machine: only that of the killed process counts a restart."""
    plan = (*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3")
    meeting = f"127.0.0.1:{ranks.free_port()}"
    options = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_id=two", "--rdzv_backend=c10d")
    options += (f"--rdzv_endpoint={meeting}", "--max-restarts=1")
    script = str(ROOT / "tests/fixtures/tiny_program.py")
    argv = tiny.arguments(tmp_path, *plan, output="parts")
    parts, terminal = tmp_path / "parts", tmp_path / "terminal.txt"
    with terminal.open("w") as stream:
        agents = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, script, *argv],
                stdout=stream, stderr=stream, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for _ in range(2)
        ]  # fmt: skip
        try:
            give_up = time.monotonic() + 120
            while not _has_epoch(parts, 2):
                assert all(agent.poll() is None for agent in agents), terminal.read_text("utf-8")
                assert time.monotonic() < give_up
                time.sleep(0.01)
            os.kill(_children(agents[1].pid)[-1], signal.SIGKILL)
            codes = [agent.wait(120) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    assert codes == [0, 0], terminal.read_text("utf-8")
    assert "Restarted by torchrun" in (parts / "log.txt").read_text("utf-8")
    tiny.assert_same_end(ranks.run_program(tmp_path, *plan, output="whole"), parts)


def _children(pid: int) -> list[int]:
    """Processes started by a process, in the order of their numbers."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
    return sorted(map(int, text.split()))


def test_a_restart_leaves_alone_what_the_first_start_refused(tmp_path: Path) -> None:
    old = tiny.run(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    before = (old / LATEST).read_bytes()
    for restarts in (0, 1):
        processes = ranks.start_program(tmp_path, restarts=restarts)
        assert ranks.wait(processes)[0] == 2
        assert "holds a training already" in ranks.terminal(tmp_path, 0)
    assert (old / LATEST).read_bytes() == before


def _not_a_number(patch: pytest.MonkeyPatch) -> None:
    """Let the last loss of epoch 2 be NaN on rank 1 alone."""
    if os.environ["RANK"] == "1":
        numbers, calls = StepOutput.numbers, []

        def broken(self: StepOutput) -> Any:
            calls.append(1)
            found = numbers(self)
            # twice a step: for the average over the processes, and for the log
            bad = len(calls) == 2 * 12 - 1
            return found | {"recovery": found["recovery"] * float("nan")} if bad else found

        patch.setattr(StepOutput, "numbers", broken)


def test_not_a_number_anywhere_stops_all_before_anything_is_saved(tmp_path: Path) -> None:
    processes = ranks.start_program(tmp_path, *tiny.PERMISSIVE, prepare=_not_a_number)
    codes = ranks.wait(processes, PROMPTLY_S)
    text = ranks.terminal(tmp_path)
    assert codes == [1, 1], text
    assert "recovery = nan" in text
    assert "no longer finite at step 12" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert tiny.native(tmp_path / "run")["epoch"] == 1
    assert (tmp_path / "run" / "nan_batch.pth").exists()
    assert "Traceback" not in text


def _full_disk(patch: pytest.MonkeyPatch) -> None:
    """Let no picture be written by rank 0."""

    def fail(*_: object) -> None:
        raise WriteError("cannot write pictures: No space left on device")

    patch.setattr("engine.trainer.save_picture", fail)


def test_a_full_disk_of_the_first_process_ends_all(tmp_path: Path) -> None:
    processes = ranks.start_program(tmp_path, prepare=_full_disk)
    codes = ranks.wait(processes, PROMPTLY_S)
    text = ranks.terminal(tmp_path)
    assert None not in codes, text
    assert 0 not in codes, text
    assert text.count("error: cannot write pictures: No space left on device") == 1
    assert "Traceback" not in text
    assert tiny.native(tmp_path / "run")["epoch"] == 0


def test_an_error_of_another_process_is_told_by_the_first(tmp_path: Path) -> None:
    processes = ranks.start_program(tmp_path, prepare=_other_fails)
    codes = ranks.wait(processes, PROMPTLY_S)
    assert None not in codes
    assert 0 not in codes
    assert "stopped: rank 1: RuntimeError: the fan has stopped" in (
        tmp_path / "run" / "log.txt"
    ).read_text("utf-8")


def _other_fails(patch: pytest.MonkeyPatch) -> None:
    if os.environ["RANK"] == "1":

        def fail(self: object) -> None:
            raise RuntimeError("the fan has stopped")

        patch.setattr("solver.optimizers.Optimizers.step_main", fail)


def test_the_keyboard_ends_all(tmp_path: Path) -> None:
    processes = ranks.start_program(tmp_path, prepare=_slow)
    _wait_until(lambda: _has_epoch(tmp_path / "run", 1), processes)
    for process in processes:  # a terminal interrupts all of them
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
    codes = ranks.wait(processes, PROMPTLY_S)
    text = ranks.terminal(tmp_path)
    assert codes == [130, 130], text
    assert text.count("interrupted") == 1
    assert "Traceback" not in text


def _second_sleeps(patch: pytest.MonkeyPatch) -> None:
    if os.environ["RANK"] == "1":
        patch.setattr("solver.optimizers.Optimizers.step_main", lambda self: time.sleep(120))


@pytest.mark.slow
def test_the_keyboard_ends_a_process_that_waits_in_a_collective(tmp_path: Path) -> None:
    """Python's handler cannot run there: the other one never comes, and is not interrupted."""
    processes = ranks.start_program(tmp_path, prepare=_second_sleeps)
    _wait_until(lambda: "Images: 3" in ranks.terminal(tmp_path, 0), processes)
    time.sleep(3)
    assert processes[0].pid is not None
    os.kill(processes[0].pid, signal.SIGINT)
    assert ranks.wait(processes, PROMPTLY_S) == [130, 130], ranks.terminal(tmp_path)


def test_a_batch_that_cannot_be_shared_is_told_once(tmp_path: Path) -> None:
    processes = ranks.start_program(tmp_path, "SOLVER.IMS_PER_BATCH", "12")
    codes = ranks.wait(processes, PROMPTLY_S)
    text = ranks.terminal(tmp_path)
    assert None not in codes
    assert 0 not in codes
    assert "which 2 processes cannot share evenly" in text
    assert "Traceback" not in text


def _protect(argv: list[str]) -> int:
    tiny.install(pytest.MonkeyPatch())
    return protect.main(argv)


def test_protect_shares_the_pictures(make_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    scene = make_scene(make_cfg, tmp_path)
    count = sum(PEOPLE.values())
    ranks.finish(ranks.start(_protect, scene.protect(), folder=tmp_path), tmp_path)
    assert f"{count} sealed, 0 already present, 0 failed" in ranks.terminal(tmp_path, 0)
    assert not ranks.terminal(tmp_path, 1)
    assert len(scene.files) == count
    assert protect.main(["verify", str(scene.sealed), *scene.keys]) == 0
    # a killed run leaves some; the same command does the rest, and lists all of them
    for path in [*scene.files[::2], scene.sealed / "manifest.ised"]:
        path.unlink()
    ranks.finish(ranks.start(_protect, scene.protect(), folder=tmp_path), tmp_path)
    assert protect.main(["verify", str(scene.sealed), *scene.keys]) == 0
    with Keyring.open(scene.keyring_path, scene.master) as keyring:
        assert len(keyring.rows) == len(PEOPLE)


def test_a_process_alone_has_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a single process needs no process group")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    monkeypatch.setattr("engine.distributed.watch.Watch.__init__", fail)
    tiny.run(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    tiny.run(tmp_path, "SOLVER.MAX_EPOCHS", "1", output="of_one")
