"""A source archive contains every file that setup.py and the program read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT

pytest.importorskip("setuptools", minversion="70.1")


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


def _steps() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, each as (name, argument) on one line."""
    text = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, argument.strip()) for name, _, argument in (x.partition(" ") for x in lines)]


def test_the_steps_of_the_container_run(tmp_path: Path) -> None:
    """Programs that change a system only record how they were called: no builder is needed."""
    calls = tmp_path / "calls"
    for name in ("pip", "useradd", "mkdir", "chown", "chmod", "rm"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n')
        program.chmod(0o755)
    torch = tmp_path / "torch.txt"
    for name, argument in _steps():
        if name == "RUN":
            subprocess.run(
                ["sh", "-ec", argument.replace("/tmp/torch.txt", str(torch))],
                cwd=ROOT,
                env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TORCH_INDEX": "index"},
                check=True,
            )
    assert [line.split(">=")[0] for line in torch.read_text().splitlines()] == [
        "torch",
        "torchvision",
    ]
    recorded = calls.read_text()
    assert "pip install -e .[cuhk03,onnx]" in recorded
    assert "chown securereid /data /keys /output" in recorded


def test_keys_and_images_are_neither_in_a_container_nor_in_git() -> None:
    files = (".gitignore", ".dockerignore")
    ignored, excluded = ((ROOT / name).read_text("utf-8").splitlines() for name in files)
    private = [x for x in ignored[ignored.index("keys.db*") :] if not x.startswith("#")]
    names = {line.strip("/") for line in private}
    # A name without a slash is at any depth in .gitignore, but at the root in .dockerignore.
    wanted = {x.strip("/") if x.startswith("/") else f"**/{x}" for x in private}
    assert wanted <= set(excluded)
    mounted = re.findall(r'"\$PWD/(\w+):', (ROOT / "Dockerfile").read_text("utf-8"))
    assert set(mounted) == {"keys", "output", "photos"} <= names


def test_the_container_runs_the_console_script_as_a_user() -> None:
    steps = _steps()
    assert ("ENTRYPOINT", '["securereid"]') in steps
    assert ("USER", "securereid") in steps
    assert "securereid = securereid.cli:main" in (ROOT / "setup.py").read_text("utf-8")
