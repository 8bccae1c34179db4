"""The decision where decoded images are kept."""

from __future__ import annotations

import pytest
import torch

from data import store
from data.store import plan_cache
from utils import memory
from utils.errors import UserError
from utils.memory import MIB, available_mib

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZE = (256, 128)  # 96 KiB an image


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    """8 GiB free on the host, 4 GiB on the GPU."""
    monkeypatch.setattr(store, "available_mib", lambda device: 4096 if device == GPU else 8192)


@pytest.mark.parametrize(
    ("images", "device", "options", "expected"),
    [
        (1_000, CPU, {}, "memory"),
        (43_000, CPU, {}, "memory"),  # 4,031 MiB: just under half
        (44_000, CPU, {}, "stream"),
        (10_000, GPU, {}, "device"),  # 938 MiB: just under a quarter
        (11_000, GPU, {}, "memory"),
        (44_000, GPU, {}, "stream"),
        (1_000, GPU, {"mode": "memory"}, "memory"),
        (1_000, GPU, {"mode": "stream"}, "stream"),
        (40_000, GPU, {"mode": "device"}, "device"),  # chosen by name: all free memory
        (80_000, CPU, {"mode": "memory"}, "memory"),
        (1_000, CPU, {"mode": "device"}, "memory"),
        (1_000, CPU, {"limit_mib": 90}, "stream"),
        (1_000, CPU, {"limit_mib": 94}, "memory"),
        (1_000, CPU, {"limit_mib": 100, "taken_bytes": 10 * MIB}, "stream"),
        (1_000, CPU, {"limit_mib": 0}, "stream"),
        (20_000, GPU, {"limit_mib": 3000}, "device"),
        (0, CPU, {}, "memory"),
    ],
)
def test_decision_table(images, device, options, expected):
    assert plan_cache(images, SIZE, device, **options).mode == expected


def test_memory_that_torch_reserved_but_does_not_use_is_free(monkeypatch):
    """After a training the same process evaluates, with CACHE.MODE device as before."""
    numbers = {
        "mem_get_info": (100 * MIB, 0),
        "memory_reserved": 700 * MIB,
        "memory_allocated": 50 * MIB,
    }
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_mib(GPU) == 750


def test_desensitized_images_are_kept_where_both_fit():
    assert plan_cache(20_000, SIZE, CPU, with_desensitized=True).keep_desensitized
    assert not plan_cache(30_000, SIZE, CPU, with_desensitized=True).keep_desensitized
    assert not plan_cache(20_000, SIZE, CPU).keep_desensitized
    assert not plan_cache(1_000, SIZE, CPU, with_desensitized=True, limit_mib=100).keep_desensitized


def test_the_reason_contains_the_size():
    reason = plan_cache(1_000, SIZE, CPU, with_desensitized=True).reason
    assert reason.startswith(
        "1000 images are kept in host memory as 8-bit raw and desensitized: 188 MiB"
    )
    assert "94 MiB if they were kept" in plan_cache(1_000, SIZE, CPU, mode="stream").reason


@pytest.mark.parametrize("options", [{"limit_mib": 10}, {"taken_bytes": 0, "limit_mib": 0}])
def test_a_mode_into_which_the_images_do_not_fit_is_an_error(options):
    with pytest.raises(
        UserError, match="mode memory needs 94 MiB for 1000 images, .* raise the limit, or"
    ):
        plan_cache(1_000, SIZE, CPU, mode="memory", **options)


def test_an_unknown_mode_names_the_choices():
    with pytest.raises(UserError, match="'disk'; expected one of auto, device, memory, stream"):
        plan_cache(1, SIZE, CPU, mode="disk")


def test_free_host_memory_is_the_smaller_of_machine_and_container(monkeypatch, tmp_path):
    assert available_mib(CPU) > 16
    for name, text in {
        "memory.max": f"{100 * MIB}\n",
        "memory.current": f"{99 * MIB}\n",
        "memory.stat": f"anon 5\ninactive_file {4 * MIB}\nactive_file {9 * MIB}\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert available_mib(CPU) == 5  # 1 MiB below the limit, and 4 MiB of page cache
    (tmp_path / "memory.max").write_text("max\n")
    assert available_mib(CPU) > 16


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "available_mib", lambda device: 100)
    size, images = (256, 128), 320  # 30 MiB
    alone = plan_cache(images, size, torch.device("cpu"))
    together = plan_cache(images, size, torch.device("cpu"), sharers=2)
    assert (alone.mode, together.mode) == ("memory", "stream")
