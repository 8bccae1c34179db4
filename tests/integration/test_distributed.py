"""Distributed runs: their results, failures, restarts and interrupts."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from engine.train_step import StepOutput
from engine.trainer import Trainer
from engine.vault.keyring import Keyring
from solver import optimizers
from tests.fixtures import ranks, tiny
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import PEOPLE, make_scene
from tests.integration.test_evaluate_only import _evaluation
from tools import protect
from utils.files import WriteError

RESUME = ("SOLVER.RESUME", "True")
# Two an epoch: processes communicate more than a hundred times in each.
FEW_STEPS = ("SOLVER.IMS_PER_BATCH", "24")
LATEST = "checkpoint_latest.pth"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)


def _damped(patch: pytest.MonkeyPatch) -> None:
    """Make Adam's step proportional to small gradients.

    Adam divides a gradient by its size, so it takes full steps along gradients that are only
    rounding errors (of a bias before a batch norm, for example), and curves would separate.
    """
    adam = optimizers.Adam
    patch.setattr(optimizers, "Adam", lambda *a, **k: adam(*a, **k, eps=1e-2))


def test_two_processes_follow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, upgradation, validation: up to rounding, over a change of the target in epoch 2.

    A single process separates as fast from itself if its weights are changed by 1e-7: in epoch 2
    a rounding error of an adversarial loss grows about threefold with every step. At the last step
    the total had changed by up to 2e-4 and one loss by 8e-3 (three such changes); another target
    changes the total by 40 %.
    """
    plan = (*tiny.PERMISSIVE, *FEW_STEPS, "SOLVER.BASE_LR", "0.0001", "TEST.IMS_PER_BATCH", "4")
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
    assert abs(last - first) > 1e-2 * first  # the curves are not constant
    assert tiny.native(two)["training"]["supervision"]["state"]["in_force"]
    assert "Supervision upgraded at epoch 1" in (two / "log.txt").read_text("utf-8")
    assert tiny.results(two)["versions"]["processes"] == "2"
    assert ranks.terminal(tmp_path, 1).count("Epoch") == 0  # only the first rank logs
    assert not list(two.glob(".*"))


def test_evaluation_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    """To the last bit; 10 does not divide the images, and one of three processes gets no query."""
    trained = tiny.finished("SOLVER.MAX_EPOCHS", "1")
    plan = _evaluation(trained, "TEST.IMS_PER_BATCH", "10", "EVAL.DETAILS", "on")
    one = tiny.run(tmp_path, *plan, output="one")
    three = ranks.run_program(tmp_path, *plan, output="three", size=3)
    results = [tiny.results(run) for run in (one, three)]
    for key in results[0]:
        if key != "versions":
            assert results[0][key] == results[1][key], key
    for name in ("per_query.csv", "details.json", "pictures.png"):
        assert (one / name).read_bytes() == (three / name).read_bytes(), name


def _wait_for_epoch(folder: Path, epoch: int, *processes: BaseProcess) -> None:
    end = time.monotonic() + ranks.HANGS_S
    while not tiny.has_epoch(folder, epoch):
        assert all(process.exitcode is None for process in processes), "ended too early"
        assert time.monotonic() < end
        time.sleep(0.05)


def _slow(patch: pytest.MonkeyPatch) -> None:
    """Make steps slow enough to disturb a run."""
    numbers = StepOutput.numbers

    def slowly(self: StepOutput) -> Any:
        time.sleep(0.1)
        return numbers(self)

    patch.setattr(StepOutput, "numbers", slowly)


def _is_killed_in_epoch_2(rank: int, patch: pytest.MonkeyPatch) -> None:
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (str(rank), "0"):
        train = Trainer._train_epoch

        def train_or_die(self: Trainer, epoch: int) -> None:
            if epoch == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            train(self, epoch)

        patch.setattr(Trainer, "_train_epoch", train_or_die)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_and_the_run_restarts(tmp_path: Path, victim: int) -> None:
    """With --max-restarts 1 the run ends like one that was not disturbed."""
    plan, killed = (*tiny.PERMISSIVE, *FEW_STEPS), partial(_is_killed_in_epoch_2, victim)
    agent = ranks.launch(tmp_path, *plan, output="parts", restarts=1, prepare=killed)
    assert ranks.wait([agent]) == [0], ranks.terminal(tmp_path)
    terminal = ranks.terminal(tmp_path)
    assert re.search(rf"exitcode: -9\) local_rank: {victim} ", terminal), terminal
    log = (tmp_path / "parts" / "log.txt").read_text("utf-8")
    assert log.count("Restarted by torchrun") == log.count("Resumed after epoch") == 1
    assert not list((tmp_path / "parts").glob(".*"))
    whole = ranks.run_program(tmp_path, *plan, output="whole")
    tiny.assert_same_end(whole, tmp_path / "parts")


def _fails_in_epoch_2(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("engine.distributed.processes._WAIT_FOR_AGENT_S", 1.0)
    if os.environ["RANK"] == "1":
        train = Trainer._train_epoch

        def fail(self: Trainer, epoch: int) -> None:
            if epoch == 2:
                raise RuntimeError("the fan has stopped")
            train(self, epoch)

        patch.setattr(Trainer, "_train_epoch", fail)


def test_an_error_in_a_rank_is_reported_and_the_same_command_resumes(tmp_path: Path) -> None:
    parts, plan = tmp_path / "parts", ("MODEL.MODE", "C", *FEW_STEPS)
    agent = ranks.launch(tmp_path, *plan, output="parts", prepare=_fails_in_epoch_2)
    assert ranks.wait([agent]) == [1]
    report = ranks.terminal(tmp_path).partition("Root Cause")[2]
    assert re.search(r"rank +: 1 .*RuntimeError: the fan has stopped", report, re.DOTALL), report
    assert tiny.native(parts)["epoch"] == 1
    ranks.run_program(tmp_path, *plan, *RESUME, output="parts")
    tiny.assert_same_end(ranks.run_program(tmp_path, *plan, output="whole"), parts)


def _torchrun(folder: Path, *options: str, plan: tuple[str, ...], **environment: str) -> Any:
    """Start torchrun itself on the program; its output goes to ``terminal_torchrun.txt``."""
    script = str(ROOT / "tests/fixtures/tiny_program.py")
    argv = tiny.arguments(folder, *plan, output="parts")
    with (folder / "terminal_torchrun.txt").open("a") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, script, *argv],
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )


def _kill_last_rank(agent: Any, folder: Path) -> None:
    """Kill a process of an agent in epoch 2 or later."""
    end = time.monotonic() + ranks.HANGS_S
    while not tiny.has_epoch(folder / "parts", 2):
        assert agent.poll() is None, ranks.terminal(folder)
        assert time.monotonic() < end
        time.sleep(0.05)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text("ascii")
    os.kill(max(map(int, children.split())), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_itself(tmp_path: Path, restarts: int) -> None:
    """It reports the killed rank, or restarts from the last checkpoint."""
    plan = (*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3")
    options = ("--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}")
    agent = _torchrun(tmp_path, *options, plan=plan)
    _kill_last_rank(agent, tmp_path)
    code, terminal = agent.wait(ranks.HANGS_S), ranks.terminal(tmp_path)
    assert code == (0 if restarts else 1), terminal
    if not restarts:
        report = terminal.partition("Root Cause")[2]
        assert re.search(r"rank +: 1 .*Signal 9 \(SIGKILL\)", report, re.DOTALL), terminal
        ranks.run_program(tmp_path, *plan, *RESUME, output="parts")
    whole = ranks.run_program(tmp_path, *plan, output="whole")
    tiny.assert_same_end(whole, tmp_path / "parts")


@pytest.mark.slow
def test_machines_restart_together(tmp_path: Path) -> None:
    """Two agents, each a machine: only that of the killed process counts a restart."""
    plan = (*tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "3")
    options = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_id=two", "--rdzv_backend=c10d")
    options += (f"--rdzv_endpoint=127.0.0.1:{ranks.free_port()}", "--max-restarts=1")
    new_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = [_torchrun(tmp_path, *options, plan=plan, **new_store) for _ in range(2)]
    try:
        _kill_last_rank(agents[1], tmp_path)
        codes = [agent.wait(ranks.HANGS_S) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert codes == [0, 0], ranks.terminal(tmp_path)
    log = (tmp_path / "parts" / "log.txt").read_text("utf-8")
    assert "Restarted by torchrun" in log
    tiny.assert_same_end(ranks.run_program(tmp_path, *plan, output="whole"), tmp_path / "parts")


@pytest.mark.slow
def test_machines_need_a_new_store_for_restarts(tmp_path: Path) -> None:
    options = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_id=two", "--rdzv_backend=c10d")
    options += (f"--rdzv_endpoint=127.0.0.1:{ranks.free_port()}", "--max-restarts=1")
    agents = [_torchrun(tmp_path, *options, plan=()) for _ in range(2)]
    assert 0 not in [agent.wait(ranks.HANGS_S) for agent in agents]
    assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in ranks.terminal(tmp_path)


def test_a_restart_does_not_resume_what_the_first_start_refused(tmp_path: Path) -> None:
    old = tiny.trained(tmp_path, "SOLVER.MAX_EPOCHS", "1")
    before = (old / LATEST).read_bytes()
    agent = ranks.launch(tmp_path, restarts=1)
    assert ranks.wait([agent]) == [1]
    assert ranks.terminal(tmp_path).count("error: ") == 2, ranks.terminal(tmp_path)
    assert "OUTPUT_DIR contains a training" in ranks.terminal(tmp_path)
    assert (old / LATEST).read_bytes() == before


def _not_a_number(patch: pytest.MonkeyPatch) -> None:
    """Make the last loss of epoch 2 NaN on rank 1 only."""
    if os.environ["RANK"] == "1":
        numbers, calls = StepOutput.numbers, []

        def broken(self: StepOutput) -> Any:
            calls.append(1)
            values = numbers(self)
            # twice a step: for the average over the processes, and for the log
            bad = len(calls) == 2 * 4 - 1
            return values | {"recovery": values["recovery"] * float("nan")} if bad else values

        patch.setattr(StepOutput, "numbers", broken)


def test_nan_on_one_rank_stops_all_before_a_checkpoint(tmp_path: Path) -> None:
    argv = tiny.arguments(tmp_path, *tiny.PERMISSIVE, *FEW_STEPS)
    processes = ranks.start(ranks.program, argv, _not_a_number, folder=tmp_path)
    codes = ranks.wait(processes)
    text = ranks.terminal(tmp_path)
    assert codes == [1, 1], text
    assert "recovery = nan" in text
    assert "no longer finite at step 4" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert tiny.native(tmp_path / "run")["epoch"] == 1
    assert (tmp_path / "run" / "nan_batch.pth").exists()
    assert "Traceback" not in text


def _full_disk(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise WriteError("cannot write pictures: No space left on device")

    patch.setattr("engine.trainer.save_image", fail)


def test_a_full_disk_of_the_first_rank_ends_all(tmp_path: Path) -> None:
    agent = ranks.launch(tmp_path, "MODEL.MODE", "C", *FEW_STEPS, prepare=_full_disk)
    assert ranks.wait([agent]) == [1]
    terminal = ranks.terminal(tmp_path)
    assert terminal.count("error: cannot write pictures: No space left on device") == 1
    assert re.search(r"Root Cause.*rank +: 0 .*WriteError", terminal, re.DOTALL), terminal
    assert tiny.native(tmp_path / "run")["epoch"] == 0


def test_an_interrupt_ends_all(tmp_path: Path) -> None:
    """Ctrl-C interrupts torchrun, whose agent interrupts the ranks."""
    agent = ranks.launch(tmp_path, "MODEL.MODE", "C", *FEW_STEPS, prepare=_slow)
    _wait_for_epoch(tmp_path / "run", 1, agent)
    assert agent.pid is not None
    os.kill(agent.pid, signal.SIGINT)
    assert ranks.wait([agent]) == [1]
    assert ranks.terminal(tmp_path).count("interrupted; to continue") == 1, ranks.terminal(tmp_path)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    argv = tiny.arguments(tmp_path, "SOLVER.IMS_PER_BATCH", "12")
    processes = ranks.start(ranks.program, argv, None, folder=tmp_path)
    codes = ranks.wait(processes)
    text = ranks.terminal(tmp_path)
    assert None not in codes
    assert 0 not in codes
    assert "which 2 processes cannot share evenly" in text
    assert "Traceback" not in text


def _protect(argv: list[str]) -> int:
    tiny.install(pytest.MonkeyPatch())
    return protect.main(argv)


def test_protect_shares_the_images(make_cfg: Callable[..., CfgNode], tmp_path: Path) -> None:
    scene = make_scene(make_cfg, tmp_path)
    count = sum(PEOPLE.values())
    command = scene.protect("--keep-original")
    ranks.finish(ranks.start(_protect, command, folder=tmp_path), tmp_path)
    assert f"{count} sealed, 0 already present, 0 failed" in ranks.terminal(tmp_path, 0)
    assert f"{count} originals sealed" in ranks.terminal(tmp_path, 0)
    assert not ranks.terminal(tmp_path, 1)
    assert len(scene.files) == count
    assert protect.main(["verify", str(scene.sealed), *scene.keys]) == 0
    # After a killed run, the same command seals the rest and lists all files.
    originals = sorted(scene.sealed.glob("*.original"))
    for path in [*scene.files[::2], *originals[::3], scene.sealed / "manifest.ised"]:
        path.unlink()
    ranks.finish(ranks.start(_protect, command, folder=tmp_path), tmp_path)
    assert sorted(scene.sealed.glob("*.original")) == originals
    assert protect.main(["verify", str(scene.sealed), *scene.keys]) == 0
    with Keyring.open(scene.keyring_path, scene.master) as keyring:
        assert len(keyring.rows) == 2 * len(PEOPLE)  # each with a key for originals


def test_a_process_alone_has_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a single process must not create a process group")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    short = ("MODEL.MODE", "C", "SOLVER.MAX_EPOCHS", "1")
    tiny.run(tmp_path, *short)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    tiny.run(tmp_path, *short, output="of_one")
