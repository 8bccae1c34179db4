"""The benchmark runs and writes what it says; how fast it is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.fixtures.paths import ROOT
from tools import benchmark
from tools.benchmarks import retrieval


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
