"""What all commands share: numbers in ranges, exit codes, missing packages, escaped text."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data import train_split
from modeling.encryption.ised_errors import KeyringMissing
from securereid.cli import COMMANDS
from tests.fixtures.paths import ROOT
from tools import (
    attack,
    benchmark,
    compare,
    data,
    demo,
    export,
    frontier,
    keyring,
    main,
    match,
    protect,
    report,
    reproduce,
    visualize,
)  # fmt: skip
from tools.lib.command_line import Parser, answer, exit_code_of, number, shown, whole_number
from utils.errors import UserError
from utils.logger import setup_logger

Main = Callable[[list[str]], int]

PROTECT = ["protect", "in", "out", "--keyring", "k", "--checkpoint", "c"]
RECOVER = ["recover", "in", "out", "--keyring", "k", "--checkpoint", "c"]
SEARCH = ["search", "a.png", "in", "--keyring", "k", "--checkpoint", "c"]
ATTACK = ["--checkpoint", "c"]
SPLIT = ["--dataset_root_dir", "d", "--dataset_name", "msmt17"]

# Every numeric argument of a command: values just outside the allowed range.
NUMBERS: dict[str, tuple[Main, list[str], str, tuple[str, ...]]] = {
    "protect batch": (protect.main, PROTECT, "--batch", ("0", "65", "many", "1.5")),
    "protect workers": (protect.main, PROTECT, "--workers", ("-1", "-3")),
    "recover batch": (protect.main, RECOVER, "--batch", ("0", "-1")),
    "search": (protect.main, SEARCH, "-k", ("0", "-1")),
    "match": (match.main, ["a", "b", *ATTACK], "--threshold", ("1.01", "-1.01", "nan", "x")),
    "attack budget": (attack.main, ATTACK, "--budget", ("15", "1000001")),
    "attack epochs": (attack.main, ATTACK, "--epochs", ("0", "10001")),
    "attack people": (attack.main, ATTACK, "--people", ("5", "100001")),
    "attack keys": (attack.main, ATTACK, "--keys", ("0", "10000001")),
    "attack seed": (attack.main, ATTACK, "--seed", ("-1", "2147483648")),
    "frontier budget": (frontier.main, ATTACK, "--budget", ("15",)),
    "frontier strength": (frontier.main, ATTACK, "--strength", ("-1", "inf", "nan")),
    "export": (export.main, ["c", "out"], "--opset", ("12", "21", "x")),
    "data batch": (data.main, ["check", "--root", "d"], "--batch", ("0",)),
    "data instances": (data.main, ["check", "--root", "d"], "--instances", ("1", "1025")),
    "split seed": (train_split.main, SPLIT, "--seed", ("-1", str(2**63))),
    "benchmark images": (benchmark.main, ["data"], "--images", ("0",)),
    "benchmark data batch": (benchmark.main, ["data"], "--batch", ("0",)),
    "benchmark data threads": (benchmark.main, ["data"], "--threads", ("-1", "4097")),
    "benchmark data repeats": (benchmark.main, ["data"], "--repeats", ("0",)),
    "benchmark step batch": (benchmark.main, ["step"], "--batch", ("-1",)),
    "benchmark steps": (benchmark.main, ["step"], "--steps", ("0",)),
    "benchmark step threads": (benchmark.main, ["step"], "--threads", ("-1",)),
    "benchmark eval batch": (benchmark.main, ["eval"], "--batch", ("-1",)),
    "benchmark eval images": (benchmark.main, ["eval"], "--images", ("3",)),
    "benchmark eval repeats": (benchmark.main, ["eval"], "--repeats", ("0",)),
    "benchmark retrieval repeats": (benchmark.main, ["retrieval"], "--repeats", ("0",)),
    "benchmark retrieval threads": (benchmark.main, ["retrieval"], "--threads", ("-1",)),
    "benchmark retrieval seed": (benchmark.main, ["retrieval"], "--seed", ("-1",)),
    "benchmark seconds": (benchmark.main, ["ised"], "--seconds", ("0", "-1", "inf")),
}


def _refused(run: Main, argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in (*words, "--help"):
        assert word in error


@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_out_of_range_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, argv, option, values = NUMBERS[case]
    for value in values:
        _refused(run, [*argv, option, value], capsys, option, f"got '{value}'", "expected a")


def test_sizes_of_a_benchmark_are_checked_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    _refused(benchmark.main, ["data", "--size", "64", "0"], capsys, "--size", "got '0'")


def test_numbers_within_the_range_are_taken() -> None:
    assert [whole_number(1, 64)(text) for text in ("1", " 7", "64")] == [1, 7, 64]
    assert whole_number(0)("1000000000") == 10**9
    assert [number(-1, 1)(text) for text in ("-1", "0.5", "1e0")] == [-1.0, 0.5, 1.0]


def test_every_mistake_of_arguments_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    _refused(protect.main, ["explode"], capsys, "explode")
    _refused(keyring.main, ["--keyring", "k", "list", "--master", "a\nb", "x", "y"], capsys)
    _refused(compare.main, ["one"], capsys, "expected two or more")
    _refused(export.main, ["c", "out", "--networks", "G"], capsys, "recover")
    _refused(Parser(prog="x").parse_args, ["--no\x1b[2J"], capsys, "\\x1b")  # type: ignore[arg-type]


# ---- exit codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a is 1; expected 2"), 2, "error: a is 1; expected 2\n"),
        (KeyringMissing("no keyring"), 4, "error: no keyring\n"),
        (OSError(28, "No space left"), 1, "error: [Errno 28] No space left; look at the disk\n"),
        (KeyboardInterrupt(), 130, "resume so\n"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise error

    assert exit_code_of(work, "resume so", remedy="look at the disk") == code
    assert capsys.readouterr().err == text


def test_a_mistake_in_the_code_keeps_its_traceback() -> None:
    for error in (ValueError("x"), RuntimeError("x"), KeyError("x")):

        def work(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            exit_code_of(work)


def test_a_full_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def work() -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nmore lines")

    assert exit_code_of(work) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: memory ran out (CUDA out of memory); lower SOLVER.IMS_PER")
    assert error.count("\n") == 1


def test_a_killed_data_loader_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Torch raises it from a signal handler, so that it can come from any line of a training."""

    def work() -> None:
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. ")

    assert exit_code_of(work) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a worker process died, perhaps because memory ran out; use f")
    assert error.count("\n") == 1


def test_a_full_machine_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's own error, and that of NumPy and Python."""
    import numpy as np
    import torch

    for work, reason in (
        (lambda: torch.empty(2**60, dtype=torch.uint8), "DefaultCPUAllocator: can't allocate"),
        (lambda: np.empty(2**60, np.uint8), "Unable to allocate"),
        (lambda: bytearray(2**62), "MemoryError"),
    ):
        assert exit_code_of(lambda work=work: work() and None) == 1  # type: ignore[misc]
        error = capsys.readouterr().err
        assert error.startswith("error: memory ran out (")
        assert reason in error and error.count("\n") == 1, error


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_early_is_not_an_error(lines: int, unbuffered: str) -> None:
    """As `head` does; before Python's own flush at its end, and after it."""
    code = (
        "import time; from tools.lib.command_line import exit_code_of\n"
        f"def work():\n time.sleep(0.3)\n for _ in range({lines}): print('x')\n"
        "raise SystemExit(exit_code_of(work))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_another_pipe_that_breaks_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    assert exit_code_of(work) == 1
    assert "Broken pipe" in capsys.readouterr().err


def test_the_exit_code_of_the_work_is_returned() -> None:
    assert exit_code_of(lambda: 5) == 5
    assert exit_code_of(lambda: None) == 0


WRONG: dict[str, tuple[Main, list[str]]] = {
    "main": (main.main, ["--config_file", "none.yml"]),
    "demo": (demo.main, ["MODEL.MDOE", "C"]),
    "reproduce": (reproduce.main, ["MODEL.MDOE", "C"]),
    "attack": (attack.main, ["--checkpoint", "none"]),
    "report": (report.main, ["none"]),
    "visualize": (visualize.main, ["ranks", "none"]),
    "frontier": (frontier.main, ["--checkpoint", "none"]),
    "match": (match.main, ["a.jpg", "b.jpg", "--checkpoint", "none"]),
    "export": (export.main, ["none", "out"]),
    "compare": (compare.main, ["none", "neither"]),
    "benchmark": (benchmark.main, ["step", "MODEL.MDOE", "C"]),
    "data": (data.main, ["check", "--root", "none"]),
    "train_split": (train_split.main, ["--dataset_root_dir", "none", *SPLIT[2:]]),
    "protect": (protect.main, ["open", "in", "in/out", "--keyring", "k", "--master", "m"]),
    "keyring": (keyring.main, ["--keyring", "k", "--passphrase-file", "-", "destroy", "x"]),
}
# The function in which a command does its work.
WORK = {
    "main": "tools.main.run",
    "demo": "tools.demo.expected_seconds",
    "attack": "tools.attack.checkpoint_config",
    "frontier": "tools.frontier.checkpoint_config",
    "reproduce": "tools.reproduce.rows_of",
    "report": "tools.report.write_report",
    "visualize": "tools.visualize.checkpoint_config",
    "match": "tools.match.compare",
    "export": "tools.export.export",
    "compare": "tools.compare.Comparison.of",
    "benchmark": "tools.benchmarks.step.run",
    "data": "tools.data.check_root",
    "train_split": "data.train_split.make_split",
    "protect": "tools.protect.check_apart",
    "keyring": "tools.keyring.UsageError",
}


def test_every_command_of_securereid_is_covered() -> None:
    commands = {module.split(".")[-1] for group in COMMANDS.values() for _, module, *_ in group}
    assert set(WRONG) == set(WORK) == commands


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input_is_exit_code_2(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run, argv = WRONG[command]
    assert run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", WORK)
def test_ctrl_c_is_exit_code_130(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WORK[command], interrupt)
    run, argv = WRONG[command]
    right = {"main": [], "demo": [], "benchmark": ["step"], "data": ["check", "--root", "."]}
    assert run(right.get(command, argv)) == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted") and error.count("\n") == 1


# ---- a Python without the packages ---------------------------------------------------------------

SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("tools", "tools/benchmarks", "data")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text("utf-8")
)


def _bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python that sees the standard library alone."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_missing_package_is_one_line(command: str) -> None:
    done = _bare(str(ROOT / command), "--help")
    assert done.returncode == 2
    assert done.stderr.startswith("error: package ")
    assert "is not installed" in done.stderr
    assert "pip install -r requirements.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_command_is_covered() -> None:
    assert {"data/train_split.py", "tools/main.py", "tools/benchmark.py"} < set(SCRIPTS)
    assert len(SCRIPTS) == 15


@pytest.mark.parametrize("module", ["engine.foo", "utils.foo", "json.foo"])
def test_a_missing_module_of_the_project_keeps_its_traceback(module: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    path = f"import sys\nsys.path[0] = {str(ROOT)!r}\n"
    script.write_text(f"{path}import utils.program\nimport {module}\n")
    done = _bare(str(script))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert f"No module named '{module}'" in done.stderr


def test_other_errors_keep_their_traceback_and_ctrl_c_its_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    path = f"import os, sys\nsys.path[0] = {str(ROOT)!r}\nimport utils.program\n"
    script.write_text(f"{path}1 / 0\n")
    done = _bare(str(script))
    assert (done.returncode, "ZeroDivisionError" in done.stderr) == (1, True)
    script.write_text(f"{path}os.kill(os.getpid(), {int(signal.SIGINT)})\n")
    done = _bare(str(script))
    assert done.returncode in (-signal.SIGINT, 130)
    assert done.stderr == "interrupted\n"  # as during the imports of a command


# ---- --json -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_with_json_nothing_else_is_on_standard_output(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with answer(as_json=as_json) as show:
        sys.stdout.write("printed\n")
        setup_logger().info("logged")
        show({"rank1": 0.5}, "rank-1 50 %")
    out, err = capsys.readouterr()
    if as_json:
        assert json.loads(out) == {"rank1": 0.5}
        assert "printed" in err and "logged" in err
    else:
        assert out.startswith("printed\n") and out.endswith("rank-1 50 %\n")
        assert err == ""


@pytest.mark.parametrize(
    "line",
    [
        *("main", "demo", "reproduce", "compare", "report", "visualize", "match", "export"),
        *("attack", "frontier", "train_split", "benchmark step", "benchmark search"),
        *("data check", "data sheet", "data draw"),
        *("protect protect", "protect open", "protect recover", "protect reveal"),
        *("protect verify", "protect search", "protect index"),
        *("keyring list", "keyring expire", "keyring audit", "keyring verify-certificate"),
    ],
)
def test_every_command_with_a_table_or_a_list_has_json(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *command = line.split()
    package = "data" if name == "train_split" else "tools"
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"{package}.{name}").main([*command, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    with answer(as_json=True) as show:
        show({"psnr_db": float("inf"), "interval": (float("nan"), 1, Path("a")), "on": True})
    out = capsys.readouterr().out
    assert json.loads(out) == {"psnr_db": None, "interval": [None, 1, "a"], "on": True}


def test_a_command_that_fails_prints_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["none", "neither", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_characters_that_control_a_terminal_are_escaped() -> None:
    assert shown("a\x9b2Jb\u202e\n") == "a\\x9b2Jb\\x202e\\x0a"
    assert shown("Zoë/人.jpg") == "Zoë/人.jpg"
