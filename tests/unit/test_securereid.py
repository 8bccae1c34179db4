"""The ``securereid`` command and package."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

import securereid
from securereid import cli
from tests.fixtures.paths import ROOT

NAMES = [(name, module) for group in cli.COMMANDS.values() for name, module, _, _ in group]


@pytest.mark.parametrize(("name", "module"), NAMES)
def test_every_command_describes_itself(
    name: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: securereid {name} ")


def test_every_program_is_a_command() -> None:
    programs = {
        f"tools.{path.stem}"
        for path in (ROOT / "tools").glob("*.py")
        if "\ndef main(" in path.read_text("utf-8")
    }
    assert programs == {module for _, module in NAMES if module.startswith("tools.")}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_help_fits_on_a_screen(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name, _ in NAMES)


def test_an_unknown_command_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["protcet"]) == 2
    assert capsys.readouterr().err == "error: 'protcet' is not a command; did you mean protect?\n"
    assert cli.main(["xyz"]) == 2
    assert "one of data, split, train" in capsys.readouterr().err


def test_arguments_and_exit_code_are_those_of_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    received: list[list[str]] = []

    def program(argv: list[str]) -> int:
        received.append(argv)
        return 3

    monkeypatch.setattr("tools.main.main", program)
    assert cli.main(["train", "--config_file=f", "A", "b"]) == 3
    assert cli.main(["evaluate", "--config_file=f", "A", "b"]) == 3
    assert received[0] == ["--config_file=f", "A", "b"]
    assert received[1] == ["--config_file=f", "A", "b", "TEST.EVALUATE_ONLY", "on"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [("securereid pro", "protect"), ("securereid keyring --ma", "--master")],
)
def test_the_shell_completes_commands_and_options(line: str, expected: str, tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    answers = tmp_path / "answers"
    done = subprocess.run(
        [sys.executable, "-m", "securereid.cli"],
        cwd=ROOT,
        env=os.environ
        | {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answers),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "_ARGCOMPLETE_IFS": "\n",
        },
        capture_output=True,
        check=False,
    )
    assert expected in answers.read_text().split(), done.stderr


def test_examples_of_the_package() -> None:
    results = doctest.testmod(securereid)
    assert results.attempted and not results.failed


def test_public_names_exist_and_are_loaded_late() -> None:
    assert all(getattr(securereid, name) for name in securereid.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(securereid, "nothing")  # noqa: B009 - the type checker knows that it is missing
    program = "import sys, securereid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_wheel_is_refused_with_the_way_to_install(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="70.1")  # as pyproject.toml requires
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run `pip install -e .`" in done.stderr
    assert not list(tmp_path.iterdir())
