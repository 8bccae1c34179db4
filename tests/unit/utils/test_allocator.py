"""Freed memory stays with the process; measured in one of its own, since it acts on all of it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.fixtures.paths import ROOT
from utils import device as allocator

_COUNT_PAGE_FAULTS = """
import resource
import torch
from utils.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(64 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
torch.ones(512 * 2**20 // 4)  # the heap grows once
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_large_tensors_are_not_mapped_afresh() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_PAGE_FAULTS],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    assert after < min(before, 1000)  # it was 5 x 64 MiB: 80,000 pages of 4 KiB


@pytest.mark.parametrize(("system", "library"), [("darwin", "glibc"), ("linux", "musl")])
def test_elsewhere_nothing_is_touched(
    monkeypatch: pytest.MonkeyPatch, system: str, library: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", pytest.fail)
    assert not allocator.keep_freed_memory()
