"""Programs keep waiting threads from spinning; asked of the library that they wait in."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.fixtures.paths import ROOT
from utils.waiting_threads import limit_spinning

_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def _rounds_of(*command: str, **settings: str) -> int:
    """What GNU OpenMP says that it took, in a process of its own."""
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
