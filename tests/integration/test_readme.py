"""What README.md shows can be typed: its commands parse, its Python example runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from yacs.config import CfgNode

from configs.defaults import KEY_BY_NAME
from configs.loading import load
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import draw, save_checkpoint

README = ROOT / "README.md"
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PLACEHOLDERS = re.compile(r"\.\.\.|[<>|]|\bKEY\b|\bFILE\b")

pytestmark = pytest.mark.skipif(not README.is_file(), reason="README.md is not written")


def _blocks(*languages: str) -> list[str]:
    return [body for language, body in _BLOCK.findall(_text()) if language in languages]


def _text() -> str:
    return README.read_text("utf-8") if README.is_file() else ""


def _commands() -> list[str]:
    """Every command that starts a script of this project, continued lines joined."""
    lines: list[str] = []
    for body in _blocks("", "sh", "bash", "shell", "console"):
        lines += body.replace("\\\n", " ").splitlines()
    plain = (line.strip().removeprefix("$ ") for line in lines)
    found = (re.match(r"(?:[A-Z_]+=\S+ )*(python3? (?:tools|data)/.*)", line) for line in plain)
    return list(dict.fromkeys(match[1] for match in found if match))


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.fixture(scope="module")
def help_of() -> Callable[..., str]:
    """What a script and its sub-command say of themselves."""
    known: dict[tuple[str, ...], str] = {}

    def text(*words: str) -> str:
        if words not in known:
            command = [sys.executable, *words, "--help"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            known[words] = done.stdout
        return known[words]

    return text


def test_there_are_commands() -> None:
    assert any("tools/main.py" in line for line in _commands())


@pytest.mark.parametrize("line", _commands())
def test_command_lines_parse(line: str, help_of: Callable[..., str]) -> None:
    """The script exists, and so does every option and every key that is shown."""
    _, script, *words = _words(line)
    assert (ROOT / script).is_file(), line
    # Only a script's own sub-commands come before its options.
    verb = re.match(r"[a-z-]+$", words[0]) if words else None
    listed = re.search(r"\{([\w,-]+)\}", help_of(script))
    chosen = words[:1] if verb and listed and words[0] in listed[1].split(",") else []
    told = help_of(script, *chosen)
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", told), f"{option} in: {line}"
    if script == "tools/main.py" and not _PLACEHOLDERS.search(line):
        _check_keys(words)


def _check_keys(words: list[str]) -> None:
    files = [word.split("=", 1)[1] for word in words if word.startswith("--config_file=")]
    if "--config_file" in words:
        files.append(words[words.index("--config_file") + 1])
    keys = [place for place, word in enumerate(words) if word in KEY_BY_NAME]
    for name in files:
        assert (ROOT / name).is_file(), name
    load(ROOT / files[0] if files else None, words[keys[0] :] if keys else ())


def test_paths_that_are_named_exist() -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", _text()):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    shown = set(re.findall(r"^(?:\$ )?make ([a-z-]+)", _text(), re.MULTILINE))
    assert shown <= targets


def test_the_python_example_runs(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small checkpoint and drawn pictures under the names that it uses."""
    examples = [body for body in _blocks("python", "py") if "import" in body]
    assert examples
    for body in examples:
        _prepare(body, make_cfg, tmp_path)
        monkeypatch.chdir(tmp_path)
        exec(compile(body, str(README), "exec"), {"__name__": "example"})  # noqa: S102


def _prepare(body: str, make_cfg: Callable[..., CfgNode], folder: Path) -> None:
    """Put a picture wherever the example names one, and a checkpoint where it names a folder."""
    for number, name in enumerate(re.findall(r"""["']([^"']+\.(?:jpg|jpeg|png))["']""", body)):
        if not (folder / name).exists():
            draw(folder / name, number)
    for name in re.findall(r"""from_checkpoint\(\s*["']([^"']+)["']""", body):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            save_checkpoint(make_cfg, folder / name)
