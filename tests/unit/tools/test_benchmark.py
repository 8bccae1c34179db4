"""Benchmarks run and write their numbers; the measured speed is not tested.

Time and memory are replaced by fixed numbers, so that no assertion depends on a measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling.build import build_networks
from tests.fixtures import tiny
from tests.fixtures.paths import ROOT
from tools import benchmark
from tools.benchmarks import (
    archive,
    data,
    evaluation,
    ised,
    measuring,
    retrieval,
    search,
    step,
)
from utils.errors import UserError

SMALL = (
    "MODEL.NAME", "resnet18", "MODEL.NGF", "2", "MODEL.NDF", "2", "UNET.NUM_DOWNS", "5",
    "INPUT.IMG_SIZE", "(32, 32)", "INPUT.RADIUS", "8", "INPUT.PADDING", "2",
)  # fmt: skip
DEMO = ["--config_file", str(ROOT / "configs/demo.yml"), "--device", "cpu", "--threads", "1"]
CEILING = 1e12


class InProcess:
    """A contender in this process: starting another one takes seconds."""

    speeds: dict[Callable[..., Any], float] = {}

    def __init__(
        self, device: str, threads: int, make: Callable[..., Any], arguments: tuple[Any, ...]
    ) -> None:
        self.images, self.speed = make(*arguments)(), self.speeds.get(make, 1.0)
        assert self.images > 0

    def images_per_s(self) -> float:
        return self.speed

    def peak_mib(self) -> float:
        return 7.0

    def close(self) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = (step.make_step, evaluation.make_pass, data.make_cached)
    monkeypatch.setattr(InProcess, "speeds", dict.fromkeys(ours, 3.0))
    monkeypatch.setattr(measuring, "Contender", InProcess)
    monkeypatch.setattr(step, "step_flops", lambda cfg: 2e9)
    monkeypatch.setattr(evaluation, "evaluation_flops", lambda cfg, count: 2e9)
    for module in (step, evaluation, data):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(measuring, "matrix_product", lambda *_: lambda: CEILING)


def _check(numbers: dict[str, float], flops: float) -> None:
    assert numbers == {
        "images_per_s": 3.0,
        "plain_images_per_s": 1.0,
        "ratio": 3.0,
        "tflops": pytest.approx(3 * flops / 1e12),
        "share_of_ceiling": pytest.approx(3 * flops / CEILING),
        "peak_mib": 7.0,
    }


@pytest.mark.parametrize("command", ["step", "eval"])
def test_networks_write_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: None, command: str
) -> None:
    path = tmp_path / "numbers.json"
    size = ["--batch", "8"] if command == "step" else ["--batch", "8", "--images", "12"]
    options = ["--repeats", "1", "--json", str(path), *SMALL]
    assert benchmark.main([command, *DEMO, *size, *options]) == 0
    _check(json.loads(path.read_text()), 2e9)
    out = capsys.readouterr().out
    assert "ratio 3.00" in out
    assert "peak memory" in out
    assert ("bare networks" in out) == (command == "eval")


def test_data_writes_an_object_for_each_desensitizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: None
) -> None:
    path = tmp_path / "numbers.json"
    size = ["--images", "32", "--batch", "16", "--size", "64", "32", "--threads", "1"]
    options = ["--type", "noise", "--repeats", "1", "--json", str(path)]
    assert benchmark.main(["data", *size, *options]) == 0
    numbers = json.loads(path.read_text())
    assert set(numbers) == {"noise"}
    # Normalisation of two images and noise on one: 2 x 3 + 4 operations for each value.
    _check(numbers["noise"], 10 * 3 * 64 * 32)
    assert "noise\n" in capsys.readouterr().out


def test_a_contender_runs_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "matrix_product", lambda *_: lambda: CEILING)
    arguments = argparse.Namespace(device="cpu", threads=1, repeats=2)
    three_images = (functools.partial, (len, "abc"))
    outcome = measuring.contest(arguments, torch.float32, 1.0, {"ours": three_images})
    assert outcome.images_per_s["ours"] > 0
    assert set(outcome.peak_mib) == {"ours"}
    assert outcome.ceiling == CEILING


def test_a_contender_that_cannot_be_built_reports_one_line() -> None:
    def fail() -> Callable[[], int]:
        raise RuntimeError("not enough memory\nand more")

    with pytest.raises(UserError, match="^RuntimeError: not enough memory$"):
        measuring.measure("turn", "cpu", 0, fail, ())


def test_retrieval_writes_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(work: Callable[[], object], device: torch.device) -> float:
        work()
        return 2.0

    monkeypatch.setattr(retrieval, "seconds", fixed)
    monkeypatch.setattr(retrieval.PeakMemory, "mib", lambda self: 5.0)
    path = tmp_path / "numbers.json"
    command = ["retrieval", "--size", "small", "--repeats", "1"]
    assert benchmark.main([*command, "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    assert numbers["size"] == "small"
    times = {numbers[key] for key in ("metrics_s", "matmul_s", "rerank_s")}
    assert times == {2.0}
    assert numbers["peak_mib"] == numbers["rerank_peak_mib"] == 5.0
    assert numbers["features_mib"] == pytest.approx(2300 * 256 * 4 / 2**20)
    assert "1.00 x the product" in capsys.readouterr().out
    monkeypatch.setattr(retrieval, "score_retrieval", lambda *_: None)
    monkeypatch.setattr(retrieval, "score_reranked", pytest.fail)
    assert benchmark.main([*command, "--no-rerank", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "re-ranking" not in err and "bare matrix product" in err
    assert json.loads(out)["rerank_s"] is None


def test_sealing_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ised, "_rate", lambda step, seconds: 2.0)
    assert benchmark.main(["ised", "--json"]) == 0
    out, err = capsys.readouterr()
    numbers = json.loads(out)
    assert numbers["images_per_s"]["seal"] == 2.0
    assert "1.0 x Pillow" in err


def test_a_missing_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["retrieval", "--size", "small", "--device", "cuda:99"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_an_unknown_backbone_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["step", "--threads", "1", "MODEL.NAME", "resnet51"]) == 2
    assert capsys.readouterr().err.startswith("error: MODEL.NAME is 'resnet51'")


def test_sizes_are_those_of_the_data_sets() -> None:
    market, msmt17 = retrieval.SIZES["market"], retrieval.SIZES["msmt17"]
    assert (market.queries, market.gallery, market.dim) == (3368, 19732, 2048)
    assert (msmt17.queries, msmt17.gallery, msmt17.dim) == (11659, 82161, 2048)


def test_a_profile_contains_trace_and_table(tmp_path: Path, in_process: None) -> None:
    config = ["--config_file", str(ROOT / "configs/demo.yml"), "--device", "cpu"]
    options = ["--batch", "8", "--profile", str(tmp_path), *SMALL]
    assert benchmark.main(["step", *config, *options]) == 0
    assert "convolution" in (tmp_path / "kernels.txt").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_flops_of_the_published_step_and_pass() -> None:
    cfg = step.network_config(str(ROOT / "configs/AGW_baseline.yml"), (), "cpu")
    assert step.step_flops(cfg) / 1e9 == pytest.approx(134.4, abs=0.1)
    # Two U-Nets of 6.02 and two re-ID passes of 8.11.
    assert step.evaluation_flops(cfg, 2) / 1e9 == pytest.approx(2 * 6.02 + 2 * 8.11, abs=0.05)


def test_the_recomputation_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch)
    plain, recomputing = (
        step.network_config(
            str(ROOT / "configs/demo.yml"), (*SMALL, "SOLVER.GRAD_CHECKPOINT", value), "cpu"
        )
        for value in ("False", "True")
    )
    assert step.step_flops(recomputing) == step.step_flops(plain)


def test_flops_are_those_of_the_layers() -> None:
    """A multiplication and an addition for each weight and each pixel of a layer's output."""
    options = (*SMALL, "MODEL.MODE", "C")
    cfg = step.network_config(str(ROOT / "configs/demo.yml"), options, "cpu")
    reid, expected = build_networks(cfg, 2).reid.eval(), []
    for layer in reid.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda conv, _, out: expected.append(2 * conv.weight.numel() * out[0, 0].numel())
            )
    reid.embed(torch.zeros(1, 3, 32, 32))
    assert step.evaluation_flops(cfg, 3) == 3 * sum(expected)


def test_search_projects_to_more_vectors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(work: Callable[[], object]) -> tuple[float, float]:
        work()
        return 4.0, 2.0

    monkeypatch.setattr(search, "wall_and_cpu_s", timed)
    sizes = ["--vectors", "20", "--dim", "4", "--subjects", "3", "--threads", "1"]
    numbers = tmp_path / "numbers.json"
    projection = ["--projected", "1000000000", "--memory", "4", "--cores", "2"]
    assert benchmark.main(["search", *sizes, *projection, "--json", str(numbers)]) == 0
    content = json.loads(numbers.read_text("utf-8"))
    assert content["projected_machines"] == 2
    assert content["projected_search_s"] == 5e8 * (2 / 20) / 2
    assert content["write_us_per_vector"] == 2e5
    assert content["disk_mib"] * 2**20 == 128 + 20 * (60 + 2 * 4 + 16)
    assert "Projection to 1,000,000,000 vectors (7 GiB)" in capsys.readouterr().out


def test_an_archive_of_two_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step runs; in this process, since starting others takes long."""
    codes = {}

    def cost_of(name: str, function: Callable[..., int], given: tuple[Any, ...]) -> archive.Cost:
        codes[name] = function(*given)
        return archive.Cost(4.0, 2.0, 7.0)

    monkeypatch.setattr(archive, "_cost_of", cost_of)
    sizes = ["--files", "12", "14", "--folder", str(tmp_path)]
    assert benchmark.main(["archive", *sizes, "--json"]) == 0
    out, err = capsys.readouterr()
    small, large = json.loads(out)["sizes"]
    assert (small["files"], large["files"], large["subjects"]) == (12, 14, 7)
    assert small["steps"]["verify"] == {"wall_s": 4.0, "cpu_s": 2.0, "peak_mib": 7.0}
    assert small["disk_mib"] < large["disk_mib"]
    assert "2.00 /     4.00 /     7" in err
    assert set(codes.values()) == {0}
    assert list(tmp_path.iterdir()) == []


def test_a_step_of_an_archive_returns_its_exit_code() -> None:
    code, cost = archive._measured(abs, (-3,))
    assert code == 3
    assert cost.wall_s >= 0
