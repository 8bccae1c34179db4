from __future__ import annotations

import re

import pytest
import torch

from utils import device as device_module
from utils.device import (
    device_name,
    has_bfloat16,
    resolve_device,
    resolve_precision,
    set_threads,
)
from utils.environment import environment_report, git_revision
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("gpus", "name", "device_id", "expected"),
    [
        (0, "auto", "0", "cpu"),
        (0, "cpu", "5", "cpu"),
        (2, "auto", "0", "cuda:0"),
        (2, "auto", "1", "cuda:1"),
        (2, "cuda", "1", "cuda:1"),
        (2, "cuda:1", "0", "cuda:1"),
        (2, "cpu", "0", "cpu"),
    ],
    indirect=["gpus"],
)
def test_device_of_a_setting(gpus: int, name: str, device_id: str, expected: str) -> None:
    assert resolve_device(name, device_id) == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "name", "device_id", "words"),
    [
        (0, "cuda", "0", "device is 'cuda' but .*CUDA.*choose cpu or auto"),
        (0, "cuda:1", "0", "device is 'cuda:1' but"),
        (1, "cuda:1", "0", "torch finds 1 CUDA device; expected a number from 0 to 0"),
        (2, "cuda", "7", "device is cuda:7 but torch finds 2 CUDA devices"),
        (2, "tpu", "0", "expected auto, cpu, cuda or cuda:N"),
        (2, "cuda:x", "0", "expected auto, cpu, cuda or cuda:N"),
        (2, "auto:1", "0", "expected auto, cpu, cuda or cuda:N"),
    ],
    indirect=["gpus"],
)
def test_a_missing_device_is_named(gpus: int, name: str, device_id: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_device(name, device_id)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512f"}, torch.float32),
        ({"AuthenticAMD", "avx512f", "avx512_bf16"}, torch.bfloat16),
        ({"GenuineIntel", "avx512f", "avx512_bf16"}, torch.float32),
        ({"GenuineIntel", "avx512_bf16", "amx_bf16"}, torch.bfloat16),
        ({"asimd", "bf16"}, torch.bfloat16),
    ],
)
def test_auto_chooses_bfloat16_only_if_it_is_faster(
    flags: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset(flags))
    assert resolve_precision("auto", CPU) is expected
    assert resolve_precision("float32", CPU) is torch.float32


def test_bfloat16_can_be_chosen_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = frozenset({"GenuineIntel", "avx512_bf16"})
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: flags)
    assert resolve_precision("bfloat16", CPU) is torch.bfloat16


def test_missing_bfloat16_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset({"avx512f"}))
    assert resolve_precision("bfloat16", CPU) is torch.float32
    (text,) = caplog.messages
    assert "computing in float32" in text
    caplog.clear()
    assert resolve_precision("auto", CPU) is torch.float32
    assert not caplog.records


def test_unknown_precision_lists_the_choices() -> None:
    with pytest.raises(UserError, match="expected one of auto, float32, bfloat16"):
        resolve_precision("float16", CPU)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_gpus_before_ampere_have_no_bfloat16(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bfloat16(torch.device("cuda:0")) is expected


def test_without_features_of_the_kernel_there_is_no_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_module, "_cpu_flags", frozenset)
    assert not has_bfloat16(CPU)


def test_threads() -> None:
    before = torch.get_num_threads()
    set_threads(0)
    assert torch.get_num_threads() == before
    set_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_report_contains_versions_and_machine() -> None:
    report = environment_report(CPU)
    assert report["torch"] == torch.__version__
    assert report["device"].startswith("cpu: ")
    assert all(isinstance(value, str) and value for value in report.values())
    assert device_name(CPU)


def test_commit_belongs_to_this_checkout(tmp_path) -> None:
    revision = git_revision()
    assert revision is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", revision)
    assert git_revision(tmp_path) is None
