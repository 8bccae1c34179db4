"""A source archive contains every file that setup.py and the program read."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT

pytest.importorskip("setuptools")


def test_a_source_archive_contains_what_it_is_built_from(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "configs", checkout / "configs")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    _setup(checkout, "sdist")
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as stream:
        stream.extractall(tmp_path)  # noqa: S202 - made a line above
    (unpacked,) = tmp_path.glob("secure*")
    _setup(unpacked, "--version")
    for name in ("configs/AGW_baseline.yml", "configs/demo.yml", "LICENSE", "README.md"):
        assert (unpacked / name).is_file()


def _setup(folder: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
