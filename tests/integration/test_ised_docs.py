"""The commands and examples of docs/ISED.md run."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from yacs.config import CfgNode

from modeling.encryption import ised_errors as errors
from tests.fixtures import tiny
from tests.fixtures.paths import ROOT
from tests.fixtures.protection import Scene, make_scene

DOCS = ROOT / "docs/ISED.md"


def _blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)


@pytest.fixture
def scene(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Scene:
    """Return a scene laid out as the documents have it, and work in it."""
    tiny.install(monkeypatch)
    scene = make_scene(make_cfg, tmp_path)
    scene.keyring_path.unlink()
    (tmp_path / "log").mkdir()
    scene.checkpoint.rename(tmp_path / "log/run")
    shutil.copy(scene.photos / "0001/0001_c1.png", tmp_path / "person.png")
    Image.open(tmp_path / "person.png").save(tmp_path / "person.jpg")
    monkeypatch.chdir(tmp_path)
    return scene


def test_command_lines_run(scene: Scene) -> None:
    blocks = (block.replace("\\\n", "") for block in _blocks(DOCS, ""))
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python3 tools/")]
    assert len(commands) == 8
    for command in commands:
        _, script, *arguments = shlex.split(command)
        tool = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        more = ["--workers", "0"] if "protect" in arguments else []
        assert tool.main([*arguments, *more]) == 0, command


def test_python_example_runs(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = _blocks(DOCS, "python")
    exec(compile(block, str(DOCS), "exec"), {})
    assert capsys.readouterr().out.startswith("(32, 64) (32, 64) ")


def test_every_error_class_is_documented() -> None:
    text = DOCS.read_text("utf-8")
    bases = {"IsedError", "AuthenticationError", "KeyringError"}
    names = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.IsedError)
    }
    assert [name for name in sorted(names - bases) if f"`{name}`" not in text] == []
