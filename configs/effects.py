"""Which keys can move a number: whether one result may stand for another, or beside it."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from yacs.config import CfgNode

from configs.defaults import KEYS
from configs.loading import changes
from utils.config_tree import get_value

# Places, devices, workers, memory, speed and logging: numbers stay the same, up to rounding.
_MOVES_NOTHING = frozenset((
    "MODEL.DEVICE", "MODEL.DEVICE_ID", "DATASETS.ROOT_DIR", "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS", "CACHE.MODE", "CACHE.LIMIT_MIB", "TEST.IMS_PER_BATCH",
    "RUNTIME.CHANNELS_LAST", "RUNTIME.COMPILE", "RUNTIME.CUDNN_BENCHMARK", "RUNTIME.THREADS",
    "SOLVER.GRAD_CHECKPOINT", "SOLVER.RESUME", "SOLVER.LOG_PERIOD", "SOLVER.CHECKPOINT_PERIOD",
))  # fmt: skip
# Read where something is scored. A training is moved by one of them: validations choose by it.
_OF_A_TEST = ("TEST.", "EVAL.", "ISED.")
_OF_VALIDATIONS = "TEST.CROSS_CAMERA"

# A key that is added to the configuration counts until it is named above.
OF_A_RESULT = tuple(key.name for key in KEYS if key.name not in _MOVES_NOTHING)
OF_A_TRAINING = tuple(
    name for name in OF_A_RESULT if name == _OF_VALIDATIONS or not name.startswith(_OF_A_TEST)
)


def moving_values(cfg: CfgNode) -> dict[str, Any]:
    """Return every value that can move a number, by name, as JSON can hold it."""
    return {name: _plain(get_value(cfg, name)) for name in OF_A_RESULT}


def differing(before: CfgNode, now: CfgNode, names: Collection[str] = OF_A_RESULT) -> list[str]:
    """Say which of some keys differ, ``SOLVER.SEED 1 (now 2)``."""
    return [
        f"{name} {was} (now {value})"
        for name, (was, value) in changes(before, now).items()
        if name in names
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    # JSON has no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
