"""Programs keep waiting threads from spinning, and say when threads stand in line for cores."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT
from utils import contention
from utils.contention import CoreWatch, limit_spinning, waited_for_cores_s

_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def _rounds_of(*command: str, **settings: str) -> int:
    """What GNU OpenMP says that it took, in a process of its own, whose library it asks."""
    environment = {name: value for name, value in os.environ.items() if name not in _OWN}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=True, cwd=ROOT,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"} | settings,
    )  # fmt: skip
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch does not use GNU OpenMP here")
    return int(found[1])


def test_threads_of_a_program_sleep_sooner_than_by_default() -> None:
    assert _rounds_of("tools/main.py", "--help") < _rounds_of("-c", "import torch")


def test_what_the_user_set_is_kept() -> None:
    assert _rounds_of("tools/main.py", "--help", GOMP_SPINCOUNT="123456") == 123456


def test_a_policy_of_the_user_is_not_refined() -> None:
    environment = {"OMP_WAIT_POLICY": "active"}
    limit_spinning(environment)
    assert environment == {"OMP_WAIT_POLICY": "active"}


class _Line:
    """Threads whose waiting is written down by hand, and a clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
        self.folder, self.now = folder, 0.0
        monkeypatch.setattr(contention, "_THREADS", folder)
        monkeypatch.setattr(contention, "_num_threads", lambda: num_threads)
        monkeypatch.setattr(contention.time, "monotonic", lambda: self.now)

    def waited(self, thread: int, seconds: float) -> None:
        (self.folder / str(thread)).mkdir(exist_ok=True)
        (self.folder / str(thread) / "schedstat").write_text(f"123 {round(seconds * 1e9)} 4\n")


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("reid_baseline").propagate = True
    return caplog


def test_threads_that_stand_in_line_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    line = _Line(tmp_path, monkeypatch, num_threads=2)
    line.waited(1, 50.0)  # before the watch began
    watch = CoreWatch()
    for seconds in (20.0, 40.0):
        line.now = seconds
        line.waited(1, 50.0 + seconds / 2)
        line.waited(2, seconds / 2)
        watch.look()
    assert [record.levelname for record in heard.records] == ["WARNING"]
    assert "the 2 threads" in heard.text
    assert "50 % of the time" in heard.text


@pytest.mark.parametrize(
    ("num_threads", "seconds", "waited_s"),
    [(1, 20.0, 19.0), (2, 20.0, 4.0), (2, 5.0, 5.0)],
    ids=["one thread", "little", "too short to tell"],
)
def test_nothing_is_said_without_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture,
    num_threads: int, seconds: float, waited_s: float,
) -> None:  # fmt: skip
    line = _Line(tmp_path, monkeypatch, num_threads)
    watch = CoreWatch()
    line.now = seconds
    line.waited(1, waited_s)
    watch.look()
    assert not heard.records


def test_a_thread_that_has_ended_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = _Line(tmp_path, monkeypatch, num_threads=2)
    line.waited(1, 1.5)
    line.waited(2, 2.5)
    (tmp_path / "3").mkdir()
    (tmp_path / "4").mkdir()
    (tmp_path / "4/schedstat").write_text("")
    assert waited_for_cores_s() == 4.0
