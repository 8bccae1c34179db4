"""Cost of the commands on archives of several sizes, from the first key to the last erasure.

For each size, a folder of small images is drawn, with half as many subjects as images. Each step
then runs in a separate process, without workers, so that CPU time and memory are those of one
process. Loading the program (imports) is not measured. Networks of one layer replace trained ones,
so that the cost is that of the archive. A cost that grows linearly multiplies as the number of
files does.

Examples:
    python3 tools/benchmark.py archive
    python3 tools/benchmark.py archive --files 2000 20000 200000 --json archive.json
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engine.api import Anonymizer
from engine.vault import erasure
from engine.vault.audit import recorded
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from engine.vault.protect import MAX_BATCH, ProtectOptions, protect_folder
from engine.vault.search import checked_matches, load_gallery, most_similar, query_embedding
from engine.vault.sources import list_sources
from engine.vault.subjects import subject_rule
from layers.pixels import PixelSpace
from tools import keyring as keyring_tool
from tools import protect as protect_tool
from tools.benchmarks.data import draw_images
from tools.benchmarks.measuring import PeakMemory, wall_and_cpu_s
from tools.lib.command_line import whole_number
from utils.errors import UserError
from utils.memory import MIB

_PER_SUBJECT = 2  # images
_DRAWN = 64  # images with different content; the others are copies
_SIZE, _DIM = (32, 32), 512  # of the networks
_RESULTS = 10  # of the search, which needs as many files
_DATASET, _SEALED, _OLD, _NEW = "photos", "sealed", "master.key", "new.key"


@dataclass(frozen=True)
class Cost:
    """What a command costs."""

    wall_s: float  # duration
    cpu_s: float  # CPU time of all threads, which a busy machine changes little
    peak_mib: float  # growth of the memory of its process after the imports


# Returns an exit code; a function of a module, since a process imports it.
_Step = tuple[Callable[..., int], tuple[object, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument(
        "--files", type=whole_number(_RESULTS), nargs="+", default=[200, 2000],
        help="sizes: images of each archive (200 2000)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, help="existing folder for the temporary archives (TMPDIR)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return the numbers."""
    sizes = []
    for files in arguments.files:
        with tempfile.TemporaryDirectory(prefix="archive-benchmark-", dir=arguments.folder) as name:
            sizes.append(_measure(Path(name), files))
    _print(sizes)
    return {"threads": torch.get_num_threads(), "sizes": sizes}


def _measure(root: Path, files: int) -> dict[str, Any]:
    """Return the numbers of one size."""
    _draw(root, files)
    costs = {}
    subjects = math.ceil(files / _PER_SUBJECT)
    for name, (function, given) in _steps(root, subjects).items():
        costs[name] = cost = _cost_of(name, function, given)
        line = f"{files:,} files: {name}: CPU {cost.cpu_s:.1f} s, {cost.wall_s:.1f} s"
        print(line, file=sys.stderr, flush=True)
    stored = [path for path in root.iterdir() if path.name.startswith("keys.db")]
    stored += (root / _SEALED).iterdir()
    return {
        "files": files,
        "subjects": subjects,
        "disk_mib": sum(path.stat().st_size for path in stored) / MIB,
        "steps": {name: asdict(cost) for name, cost in costs.items()},
    }


def _draw(root: Path, files: int) -> None:
    """Draw a folder of images, of which each subject has two, and files with two labels."""
    drawn = root / "drawn"
    drawn.mkdir()
    draw_images(drawn, min(files, _DRAWN))
    contents = [path.read_bytes() for path in sorted(drawn.iterdir())]
    for number in range(files):
        folder = root / _DATASET / f"{number // _PER_SUBJECT:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number % _PER_SUBJECT}.jpg").write_bytes(contents[number % len(contents)])
    for name, subject in (("label.txt", 0), ("erased.txt", (files - 1) // _PER_SUBJECT)):
        (root / name).write_text(f"{_DATASET}/{subject:06d}\n", encoding="utf-8")


def _steps(root: Path, subjects: int) -> dict[str, _Step]:
    """Return the steps in their order."""
    sealed, old, new = (root / name for name in (_SEALED, _OLD, _NEW))

    def protect(name: str, *words: object) -> _Step:
        keys = ("--keyring", root / "keys.db", "--master", old)
        return protect_tool.main, ([str(word) for word in (name, *words, *keys)],)

    def keyring(*words: object, master: Path = new) -> _Step:
        keys = ("--keyring", root / "keys.db", "--master", master)
        return keyring_tool.main, ([str(word) for word in (*keys, *words)],)

    certificate = ("--folder", sealed, "--certificate", root / "erasure.json", "--yes")
    return {
        "create keyring and keys": (_create_keys, (root, subjects)),
        "protect, with index": (_protect, (root,)),
        "protect again": (_protect, (root,)),
        "verify": protect("verify", sealed),
        "search": (_search, (root,)),
        "reveal --subject-file": protect(
            "reveal", sealed, root / "answer", "--subject-file", root / "label.txt"
        ),
        "keyring list": keyring("list", master=old),
        "keyring rekey": keyring("rekey", "--new-master", new, master=old),
        "destroy --certificate": keyring(
            "destroy", "--subject-file", root / "erased.txt", *certificate
        ),
        "verify-certificate": keyring("verify-certificate", root / "erasure.json"),
        "expire all keys": (_expire, (root,)),
        "audit --verify": keyring("audit", "--verify"),
    }


def _cost_of(name: str, function: Callable[..., int], given: tuple[object, ...]) -> Cost:
    """Run a step in a separate process; return its cost.

    Raises:
        UserError: It failed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            code, cost = process.submit(_measured, function, given).result()
        except BrokenProcessPool:
            raise UserError(f"the process of `{name}` was killed; try fewer --files") from None
    if code != 0:
        raise UserError(f"`{name}` failed with code {code}; its error is in the lines above")
    return cost


def _measured(function: Callable[..., int], given: tuple[object, ...]) -> tuple[int, Cost]:
    """Run a step; return its exit code and cost. Its result is not printed."""
    memory = PeakMemory(torch.device("cpu"))
    codes: list[int] = []
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        wall_s, cpu_s = wall_and_cpu_s(lambda: codes.append(function(*given)))
    return codes[0], Cost(wall_s, cpu_s, memory.mib())


def _create_keys(root: Path, subjects: int) -> int:
    with Keyring.create(root / "keys.db", KeyFile(root / _OLD)) as keyring:
        keyring.ensure(f"{_DATASET}/{number:06d}" for number in range(subjects))
    return 0


def _protect(root: Path) -> int:
    """Protect the images as the command does, with an index."""
    options = ProtectOptions(_DATASET, subject_rule("folder", _DATASET), MAX_BATCH, workers=0)
    with _recorded(root, _OLD, "protect") as keyring:
        source, target = list_sources(root / _DATASET), root / _SEALED
        return protect_folder(source, target, _model(), keyring, options).exit_code


def _search(root: Path) -> int:
    """Search one image as the command does."""
    model = _model()
    with _recorded(root, _OLD, "search") as keyring:
        query = query_embedding(root / _DATASET / "000000/0.jpg", keyring, model)
        gallery = load_gallery(root / _SEALED, keyring, model, _DIM)
        found = most_similar(gallery.vectors, query.vector[None], _RESULTS)
        matches, unusable = checked_matches(gallery, found[0][0], found[1][0], keyring)
    return int(len(matches) < _RESULTS or bool(unusable))


@contextmanager
def _recorded(root: Path, master: str, name: str) -> Iterator[Keyring]:
    with Keyring.open(root / "keys.db", KeyFile(root / master)) as keyring, recorded(keyring, name):
        yield keyring


class _ReID(nn.Module):
    """Returns embeddings of random projections of an image of _SIZE."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * _SIZE[0] * _SIZE[1], _DIM)

    def forward(self, images: Tensor) -> SimpleNamespace:
        """Return an object with embeddings (B, _DIM)."""
        return SimpleNamespace(embedding=self.layer(images.flatten(1)))


def _model() -> Anonymizer:
    """Return the same random networks in every process."""
    torch.manual_seed(0)
    anonymizer = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
    pixels = PixelSpace((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    networks = (anonymizer, nn.Identity(), _ReID())
    return Anonymizer(*networks, size=_SIZE, pixels=pixels, device=torch.device("cpu"))


def _expire(root: Path) -> int:
    """Destroy all keys as `keyring expire` does with keys that are old enough."""
    with _recorded(root, _NEW, "expire") as keyring:
        rows, _ = erasure.expired(keyring, -1, "used")
        erasure.expire(keyring, -1, "used", {row.key_id for row in rows})
    return 0


def _print(sizes: list[dict[str, Any]]) -> None:
    """Print a table: CPU time, duration and memory of each step at each size."""
    print("CPU s / s / MiB of each step")
    print(" " * 26 + "".join(f"{size['files']:>26,} files" for size in sizes))
    for name in sizes[0]["steps"]:
        costs = [Cost(**size["steps"][name]) for size in sizes]
        cells = (f"{c.cpu_s:12.2f} /{c.wall_s:9.2f} /{c.peak_mib:6.0f}" for c in costs)
        print(f"{name:26}" + "".join(cells))
    print("disk: " + ", ".join(f"{size['disk_mib']:,.0f} MiB" for size in sizes))
