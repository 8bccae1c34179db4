"""Settings and fixtures of all tests: one thread, repeatable examples, skips with a reason.

With pytest-xdist this file is also imported by the process that only distributes the tests. So
functions import what would load torch, which takes seconds.
"""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.fixtures.devices import mounted
from tests.fixtures.paths import ROOT, SHARED_DATA
from tests.fixtures.small_configs import SMALL

if TYPE_CHECKING:
    from yacs.config import CfgNode

# A shell starts background jobs with SIGINT ignored, and child processes inherit that. Some tests
# interrupt themselves or their children, so SIGINT must work in a background job as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Until all tests are collected: importing creates objects, and hardly any garbage.
gc.disable()

# A training imports the last two when it needs them.
_PRELOADED = ["tests.fixtures.ranks", "torch._dynamo", "torch.utils.tensorboard"]

# Same examples in every run. No deadlines, which would fail tests on a busy machine.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu without a CUDA device, and tests marked data without photographs."""
    import torch

    # The test processes already use all cores; more threads would only slow them down.
    torch.set_num_threads(1)
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_data = pytest.mark.skip(reason=f"{SHARED_DATA} is missing")
    for item in items:
        # item.keywords contains folder names too, such as tests/unit/data.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("data") and not SHARED_DATA.is_dir():
            item.add_marker(no_data)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude imported modules and tests from garbage collection; a full one took 0.25 s.

    If a test starts processes of a training, start the server whose forks they are. It has imported
    what would take each of them seconds. A server that `protect` starts has not.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    if any(
        hasattr(item.module, "tiny") for item in session.items if isinstance(item, pytest.Function)
    ):
        forkserver.set_forkserver_preload(_PRELOADED)
        forkserver.ensure_running()


@pytest.fixture
def make_cfg(tmp_path: Path) -> Callable[..., CfgNode]:
    """Return ``make_cfg(*overrides)``: a small CPU configuration with its folders in tmp_path."""
    from configs.loading import load

    def make(*overrides: str) -> CfgNode:
        folders = ("OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.ROOT_DIR", str(tmp_path / "sets"))
        return load(ROOT / "configs/demo.yml", [*SMALL, *folders, *overrides])

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 64 KiB."""
    with mounted(tmp_path / "small", "size=64k") as folder:
        yield folder


@pytest.fixture(autouse=True)
def _new_logger() -> Iterator[None]:
    """Close the log file, and let records propagate to pytest, before and after each test.

    Without the first, records of a test are captured twice if an earlier test, or a fixture of a
    module, has set up the logger: pytest also adds its handler to loggers that do not propagate.
    """
    _reset_logger()
    yield
    _reset_logger()


def _reset_logger() -> None:
    from utils.logger import close_logger, get_logger

    close_logger()
    get_logger().setLevel(logging.INFO)  # as in a program
    get_logger().propagate = True
