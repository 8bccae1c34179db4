"""Settings of a script before its imports: OpenMP threads that wait sleep soon."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fixtures.paths import ROOT

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "5000"),
        ({"GOMP_SPINCOUNT": "123456"}, "123456"),
        ({"OMP_WAIT_POLICY": "active"}, "not set"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_user_chose(
    settings: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    code = "import os, utils.program; print(os.environ.get('GOMP_SPINCOUNT', 'not set'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment | settings,
    )  # fmt: skip
    assert done.stdout.strip() == expected
