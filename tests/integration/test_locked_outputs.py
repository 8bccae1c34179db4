"""A second writer to an output folder ends with one line, and changes nothing in the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from configs import loading
from tests.fixtures import tiny
from tools import attack, export, frontier, main, protect
from utils.files import LOCK_NAME, locked_folder

Command = Callable[[list[str]], int]


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """A folder that another run writes to."""
    with locked_folder(tmp_path / "run") as folder:
        yield folder


def _training(folder: Path) -> list[str]:
    return tiny.arguments(folder)


def _attack(folder: Path) -> list[str]:
    (folder / "trained").mkdir()
    cfg = loading.load(None, ["OUTPUT_DIR", str(folder / "trained")])
    loading.dump(cfg, folder / "trained" / "config.yml")
    return ["--checkpoint", str(folder / "trained"), "--output", str(folder / "run")]


def _export(folder: Path) -> list[str]:
    return [str(folder / "trained"), str(folder / "run")]


def _protect(folder: Path) -> list[str]:
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "images" / "0001_c1.png")
    keys = ("--keyring", str(folder / "keys.db"), "--master", str(folder / "master.key"))
    places = (str(folder / "images"), str(folder / "run"), "--checkpoint", str(folder / "trained"))
    return ["protect", *places, *keys]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (main.main, _training),
        (attack.main, _attack),
        (frontier.main, _attack),
        (export.main, _export),
        (protect.main, _protect),
    ],
    ids=["main", "attack", "frontier", "export", "protect"],
)
def test_a_second_run_is_refused(
    tmp_path: Path,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    command: Command,
    arguments: Callable[[Path], list[str]],
) -> None:
    assert command(arguments(tmp_path)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert f"{output} is in use by process" in error[0]
    assert [path.name for path in output.iterdir()] == [LOCK_NAME]
