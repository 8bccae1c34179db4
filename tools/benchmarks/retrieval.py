"""Speed of retrieval scores on random features, compared with the matrix product alone.

The features are in memory, float32. Time is the best of ``--repeats`` runs. Each is measured next
to its matrix product: the same chunks of the same matrices. Peak memory is the growth of the
process after its imports, including the features, before re-ranking.

Examples:
    python3 tools/benchmark.py retrieval --size market
    python3 tools/benchmark.py retrieval --size msmt17 --json msmt17.json --no-rerank
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from typing import Any

import torch

from engine.scoring.features import Features
from engine.scoring.reranking import score_reranked
from engine.scoring.retrieval import score_retrieval
from tools.benchmarks.measuring import PeakMemory, add_measuring_arguments, seconds
from tools.lib.command_line import MAX_SEED, whole_number
from utils.device import device_name, exact_float32, resolve_device, set_threads
from utils.memory import MIB

_CHUNK_BYTES = 64 * MIB
_CUDA_CHUNK_BYTES = 1024 * MIB


@dataclass(frozen=True)
class Size:
    """Size of a data set."""

    queries: int  # query images
    gallery: int  # gallery images, junk and distractors included
    identities: int  # identities in query and gallery
    cameras: int  # cameras
    distractors: int = 0  # gallery images of other identities (pid 0)
    junk: int = 0  # gallery images that are not scored (pid -1)
    dim: int = 2048  # feature size


SIZES = {
    "small": Size(300, 2000, 60, 6, 200, 100, dim=256),
    "market": Size(3368, 19732, 750, 6, 2798, 3819),
    "msmt17": Size(11659, 82161, 3060, 15),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="market", help="size of a data set"
    )
    add_measuring_arguments(parser, device="cpu")
    parser.add_argument("--no-rerank", action="store_true", help="leave out re-ranking")
    parser.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=1, help="seed of the random features"
    )


def random_features(size: Size, seed: int, device: torch.device) -> tuple[Features, Features]:
    """Return query and gallery features; every query identity is in the gallery."""
    generator = torch.Generator().manual_seed(seed)

    def people(count: int) -> torch.Tensor:
        return torch.arange(count) % size.identities + 1

    def draw(pids: torch.Tensor) -> Features:
        cameras = torch.randint(size.cameras, (len(pids),), generator=generator)
        # Drawn in place on the CPU, so that the peak memory contains only one copy.
        embeddings = torch.empty(len(pids), size.dim).normal_(generator=generator)
        return Features(embeddings.to(device), pids, cameras)

    persons = size.gallery - size.distractors - size.junk
    pids = [people(persons), torch.zeros(size.distractors), -torch.ones(size.junk)]
    order = torch.randperm(size.gallery, generator=generator)
    return draw(people(size.queries)), draw(torch.cat(pids).long()[order])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    set_threads(arguments.threads)
    device = resolve_device(arguments.device)
    size = SIZES[arguments.size]
    memory = PeakMemory(device)
    query, gallery = random_features(size, arguments.seed, device)
    features_mib = sum(features.embeddings.nbytes for features in (query, gallery)) / MIB
    metrics, matmul = [], []
    for _ in range(arguments.repeats):
        matmul.append(seconds(lambda: bare_product(query, gallery), device))
        metrics.append(seconds(lambda: score_retrieval(query, gallery), device))
    result: dict[str, Any] = {
        "size": arguments.size,
        "metrics_s": min(metrics),
        "matmul_s": min(matmul),
        "rerank_s": None,
        "peak_mib": memory.mib(),
        "features_mib": features_mib,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if not arguments.no_rerank:
        result["rerank_s"] = seconds(lambda: score_reranked(query, gallery), device)
        result["rerank_peak_mib"] = memory.mib()
    _print(result, size)
    return result


def bare_product(query: Features, gallery: Features) -> None:
    """Multiply the same matrices in chunks of the same size, and discard the result."""
    matrix = gallery.embeddings
    chunk = _CUDA_CHUNK_BYTES if matrix.is_cuda else _CHUNK_BYTES
    rows = min(max(1, chunk // (4 * len(matrix))), len(query))
    out = torch.empty(rows, len(matrix), device=matrix.device)
    with torch.inference_mode(), exact_float32(matrix.device):
        for part in query.embeddings.split(rows):
            torch.mm(part, matrix.t(), out=out[: len(part)])


def _print(result: dict[str, Any], size: Size) -> None:
    metrics, matmul = result["metrics_s"], result["matmul_s"]
    above = result["peak_mib"] - result["features_mib"]
    print(
        f"{result['size']}: {size.queries:,} queries x {size.gallery:,} gallery images x "
        f"{size.dim:,}, float32, on {result['device']}, {result['threads']} threads"
    )
    print(f"  bare matrix product   {matmul:8.2f} s")
    print(
        f"  all scores            {metrics:8.2f} s   {metrics / matmul:.2f} x the product, "
        f"{metrics - matmul:.2f} s on top of it"
    )
    print(f"  peak memory           {result['peak_mib']:8.0f} MiB, {above:.0f} above the features")
    if result["rerank_s"] is not None:
        print(
            f"  re-ranking and scores {result['rerank_s']:8.2f} s, peak "
            f"{result['rerank_peak_mib']:.0f} MiB"
        )
