"""Speed and memory of an index: writing, opening and searching encrypted embeddings.

Random vectors are sealed into a temporary folder, opened and searched; no image is involved. Each
duration is given with the CPU time of all threads, which a busy machine changes little. The numbers
are then projected to more vectors on several machines.

Examples:
    python3 tools/benchmark.py search
    python3 tools/benchmark.py search --vectors 1000000 --dim 512 --queries 16
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.vault.index import DIGEST_BYTES, IndexWriter, VectorKeys, read_segments
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from engine.vault.search import most_similar
from tools.benchmarks.measuring import PeakMemory, wall_and_cpu_s
from tools.lib.command_line import MAX_THREADS, whole_number
from utils.device import set_threads
from utils.memory import MIB

_CPU = torch.device("cpu")
_RANDOM_ROWS = 1000  # random vectors, repeated: drawing all of them would take longer than the rest
_RESULTS = 10
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    for name, default, text in (
        ("--vectors", 100_000, "vectors"),
        ("--dim", 2048, "dimensions; 2048 as the published re-ID network"),
        ("--subjects", 1500, "subjects with a key each; 1500 as Market-1501"),
        ("--queries", 1, "queries that are searched together"),
        ("--projected", 100_000_000, "vectors of the projection"),
        ("--memory", 256, "GiB of memory for vectors on a machine of the projection"),
        ("--cores", 32, "cores of a machine of the projection"),
        ("--bandwidth", 100, "GB/s that its memory can read"),
        ("--repeats", 3, "searches, of which the fastest counts"),
    ):
        parser.add_argument(name, type=whole_number(1), default=default, help=f"{text} ({default})")
    parser.add_argument(
        "--threads", type=whole_number(0, MAX_THREADS), default=0,
        help="CPU threads of the search; 0: torch's choice",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    set_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="search-benchmark-") as name:
        numbers = _measure(Path(name), arguments)
    numbers |= _projection(numbers, arguments)
    _print(numbers, arguments)
    return numbers


def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    count, dim = arguments.vectors, arguments.dim
    path, master = folder / "keys.db", KeyFile(folder / "master.key")
    vectors = _unit(np.random.default_rng(0), min(count, _RANDOM_ROWS), dim)
    with Keyring.create(path, master) as keyring:
        keyring.ensure(f"set/{number}" for number in range(arguments.subjects))
        key_ids = [row.key_id for row in keyring.rows]

        def write() -> None:
            writer = IndexWriter(folder, keyring, bytes(32))
            for number in range(count):
                digest = number.to_bytes(DIGEST_BYTES, "big")
                writer.add(key_ids[number % len(key_ids)], digest, vectors[number % len(vectors)])
            writer.flush()

        written = wall_and_cpu_s(write)
    os.sync()  # not while the following is measured
    memory, opened = PeakMemory(_CPU), np.empty((count, dim), np.float16)

    def unlock() -> None:
        Keyring.open(path, master).close()

    def read() -> None:
        with Keyring.open(path, master) as keyring:
            keys, row, view = VectorKeys(keyring), 0, opened.view(np.uint8).reshape(-1).data
            for segment in read_segments(folder, keyring):
                for entry, ciphertext in segment.vectors():
                    view[row : row + 2 * dim] = keys.open(segment, entry, ciphertext)
                    row += 2 * dim

    unlocked, read_all = wall_and_cpu_s(unlock), wall_and_cpu_s(read)
    queries = torch.from_numpy(_unit(np.random.default_rng(1), arguments.queries, dim)).float()
    searches = [
        wall_and_cpu_s(lambda: most_similar(opened, queries, _RESULTS))
        for _ in range(arguments.repeats)
    ]
    disk_bytes = sum(path.stat().st_size for path in folder.glob("index-*"))
    numbers: dict[str, Any] = {
        "vectors": count,
        "dim": dim,
        "subjects": arguments.subjects,
        "queries": arguments.queries,
        "threads": torch.get_num_threads(),
        "peak_mib": memory.mib(),
        "vectors_mib": opened.nbytes / MIB,
        "disk_mib": disk_bytes / MIB,
    }
    for clock, name in enumerate(("", "cpu_")):
        numbers |= {
            f"{name}write_us_per_vector": 1e6 * written[clock] / count,
            f"{name}keyring_s": unlocked[clock],
            f"{name}open_us_per_vector": 1e6 * (read_all[clock] - unlocked[clock]) / count,
            f"{name}open_s": read_all[clock],
            f"{name}search_s": min(search[clock] for search in searches),
        }
    return numbers


def _unit(rng: np.random.Generator, count: int, dim: int) -> NDArray[np.float16]:
    """Return random unit vectors, float16 (count, dim)."""
    vectors = rng.standard_normal((count, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16)


def _projection(numbers: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return memory, machines, opening and search time for more vectors."""
    row_bytes, total = 2 * arguments.dim, arguments.projected
    machines = math.ceil(total * row_bytes / (arguments.memory * _GIB))
    share = total / machines
    computed_s = share * numbers["cpu_search_s"] / numbers["vectors"] / arguments.cores
    return {
        "projected_vectors": total,
        "projected_gib": total * row_bytes / _GIB,
        "projected_machines": machines,
        "projected_open_s": share * numbers["cpu_open_us_per_vector"] / 1e6 / arguments.cores,
        "projected_search_s": max(computed_s, share * row_bytes / (1e9 * arguments.bandwidth)),
    }


def _print(numbers: dict[str, Any], arguments: argparse.Namespace) -> None:
    print(
        f"{numbers['vectors']:,} vectors x {numbers['dim']:,}, float16, of "
        f"{numbers['subjects']:,} subjects, {numbers['threads']} threads"
    )
    for name, key, unit, digits in (
        ("seal and write", "write_us_per_vector", "us per vector", 1),
        ("open the keyring", "keyring_s", "s", 2),
        ("open vectors", "open_us_per_vector", "us per vector", 1),
        ("open all", "open_s", "s", 2),
        (f"search, queries: {numbers['queries']}", "search_s", "s", 3),
    ):
        values = f"{numbers[key]:9.{digits}f} {unit} (CPU {numbers[f'cpu_{key}']:.{digits}f})"
        print(f"  {name:<20}{values}")
    print(
        f"  peak memory         {numbers['peak_mib']:9.0f} MiB, {numbers['vectors_mib']:.0f} are "
        f"vectors; {numbers['disk_mib']:.0f} MiB on the disk"
    )
    print(
        f"Projection to {numbers['projected_vectors']:,} vectors "
        f"({numbers['projected_gib']:,.0f} GiB):"
    )
    print(
        f"  {numbers['projected_machines']} machines with {arguments.memory} GiB for vectors and "
        f"{arguments.cores} cores: open {numbers['projected_open_s']:,.0f} s once, search "
        f"{numbers['projected_search_s']:,.2f} s"
    )
    print(
        "  Assumes: one folder per machine, all searched at the same time; the CPU time per vector "
        "measured here,\n  divided among all cores, but no search faster than memory is read "
        f"({arguments.bandwidth} GB/s); disks that keep up; nothing for\n  merging the results."
    )
