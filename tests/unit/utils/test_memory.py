"""Freed memory stays with the process; tested in a child process, which it changes."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.fixtures.paths import ROOT
from utils import memory

# A block that stays in use above a freed one of 64 MiB: the next block of this size gets the same
# address only if the allocator has kept the freed one. Otherwise it is mapped, beyond the heap.
_CODE = """
import ctypes
from utils.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]

def is_in_the_heap():
    block = libc.malloc(64 * 2**20)
    end = libc.sbrk(0)
    libc.free(block)
    return block < end and libc.sbrk(0) == end  # not mapped, and not returned when freed

print(is_in_the_heap(), keep_freed_memory(), is_in_the_heap())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_large_blocks_come_from_the_heap_and_stay_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CODE], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["False", "True", "True"]


@pytest.mark.parametrize(("system", "library"), [("darwin", "glibc"), ("linux", "musl")])
def test_other_systems_are_left_unchanged(
    monkeypatch: pytest.MonkeyPatch, system: str, library: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", pytest.fail)
    assert not memory.keep_freed_memory()
