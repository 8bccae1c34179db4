"""The benchmark runs and writes what it says; how fast it is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from modeling.build import build_networks
from tests.fixtures.paths import ROOT
from tools import benchmark
from tools.benchmarks import evaluation, networks, retrieval, step
from tools.benchmarks import measuring as contest


def test_small_size_writes_the_numbers(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert (
        benchmark.main(["retrieval", "--size", "small", "--repeats", "1", "--json", str(path)]) == 0
    )
    numbers = json.loads(path.read_text())
    assert numbers["size"] == "small"
    for key in ("metrics_s", "matmul_s", "rerank_s", "features_mib"):
        assert numbers[key] > 0
    assert numbers["peak_mib"] >= 0
    assert numbers["features_mib"] == pytest.approx(2300 * 256 * 4 / 2**20)
    assert "x the product" in capsys.readouterr().out


def test_re_ranking_can_be_left_out(capsys):
    assert benchmark.main(["retrieval", "--size", "small", "--repeats", "1", "--no-rerank"]) == 0
    assert "re-ranking" not in capsys.readouterr().out


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert benchmark.main(["retrieval", "--size", "small", "--device", "cuda:99"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_runs_as_a_file():
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "retrieval", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "--size" in done.stdout


def test_sizes_are_those_of_the_data_sets():
    market, msmt17 = retrieval.SIZES["market"], retrieval.SIZES["msmt17"]
    assert (market.queries, market.gallery, market.dim) == (3368, 19732, 2048)
    assert (msmt17.queries, msmt17.gallery, msmt17.dim) == (11659, 82161, 2048)


SMALL = (
    "MODEL.NAME", "resnet18", "MODEL.NGF", "2", "MODEL.NDF", "2", "UNET.NUM_DOWNS", "5",
    "INPUT.IMG_SIZE", "(32, 32)", "INPUT.RADIUS", "8", "INPUT.PADDING", "2",
)  # fmt: skip
NUMBERS = {
    "images_per_s", "plain_images_per_s", "ratio", "tflops", "share_of_ceiling", "peak_mib",
}  # fmt: skip


class Beside:
    """A contender in this process: `data` runs the true one, which takes seconds to start."""

    def __init__(self, place, make, arguments):
        self.work = make(*arguments)

    def images_per_s(self):
        start = time.perf_counter()
        return self.work() / (time.perf_counter() - start)

    def finish(self):
        return 1.0

    def close(self):
        pass


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(contest, "Contender", Beside)
    for module in (step, evaluation):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: False)


def _check(numbers):
    assert set(numbers) == NUMBERS
    assert all(value > 0 for value in numbers.values())
    assert numbers["ratio"] == pytest.approx(
        numbers["images_per_s"] / numbers["plain_images_per_s"]
    )


@pytest.mark.parametrize("command", ["step", "eval"])
def test_networks_write_the_numbers(tmp_path, capsys, in_process, command):
    path = tmp_path / "numbers.json"
    size = ["--batch", "8"] if command == "step" else ["--batch", "8", "--images", "12"]
    config = ["--config_file", str(ROOT / "configs/demo.yml"), "--device", "cpu", "--threads", "1"]
    places = ["--repeats", "1", "--json", str(path), *SMALL]
    assert benchmark.main([command, *config, *size, *places]) == 0
    numbers = json.loads(path.read_text())
    _check(numbers)
    out = capsys.readouterr().out
    assert f"ratio {numbers['ratio']:.2f}" in out
    assert "peak memory" in out
    assert ("bare networks" in out) == (command == "eval")


def test_data_writes_an_object_a_desensitizer(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    size = ["--images", "32", "--batch", "16", "--size", "64", "32", "--threads", "1"]
    assert (
        benchmark.main(["data", *size, "--type", "noise", "--repeats", "1", "--json", str(path)])
        == 0
    )
    numbers = json.loads(path.read_text())
    assert set(numbers) == {"noise"}
    _check(numbers["noise"])
    assert "noise\n" in capsys.readouterr().out


def test_a_step_that_cannot_be_built_is_one_line(capsys):
    arguments = ["step", "--threads", "1", "MODEL.NAME", "resnet51"]
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: MODEL.NAME is 'resnet51'")


def test_a_profile_keeps_trace_and_table(tmp_path, in_process):
    config = ["--config_file", str(ROOT / "configs/demo.yml"), "--device", "cpu"]
    assert (
        benchmark.main(["step", *config, "--batch", "8", "--profile", str(tmp_path), *SMALL]) == 0
    )
    assert "convolution" in (tmp_path / "kernels.txt").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_flops_of_the_published_step_and_pass():
    cfg = networks.network_config(str(ROOT / "configs/AGW_baseline.yml"), (), "cpu")
    flops = networks.step_flops(cfg)
    assert flops / 1e9 == pytest.approx(134.4, abs=0.1)
    again = networks.network_config(
        "configs/AGW_baseline.yml", ("SOLVER.GRAD_CHECKPOINT", "True"), "cpu"
    )
    assert networks.step_flops(again) == flops  # what is computed twice is no work done twice
    # Two U-Nets of 6.02 and five re-ID passes of 8.11.
    assert networks.evaluation_flops(cfg, 5) / 1e9 == pytest.approx(2 * 6.02 + 5 * 8.11, abs=0.05)


def test_flops_are_those_of_the_layers():
    """A multiplication and an addition for each weight and each pixel of a layer's output."""
    options = (*SMALL, "MODEL.MODE", "C")
    cfg = networks.network_config(str(ROOT / "configs/demo.yml"), options, "cpu")
    reid, by_hand = build_networks(cfg, 2).reid.eval(), []
    for layer in reid.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda one, _, out: by_hand.append(2 * one.weight.numel() * out[0, 0].numel())
            )
    reid.embed(torch.zeros(1, 3, 32, 32))
    assert networks.evaluation_flops(cfg, 3) == 3 * sum(by_hand)
