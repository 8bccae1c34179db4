"""Which keys can move a number: whether one result may stand for another, or beside it."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from configs.defaults import KEYS
from configs.loading import changes
from configs.published import IMAGENET_FILE
from utils.config_tree import get_value

# Places, devices, workers, memory, speed and logging: numbers stay the same, up to rounding. Of two
# places something counts: see ``differing``.
_MOVES_NOTHING = frozenset((
    "MODEL.DEVICE", "MODEL.DEVICE_ID", "DATASETS.ROOT_DIR", "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS", "CACHE.MODE", "CACHE.LIMIT_MIB", "TEST.IMS_PER_BATCH",
    "RUNTIME.CHANNELS_LAST", "RUNTIME.COMPILE", "RUNTIME.CUDNN_BENCHMARK", "RUNTIME.THREADS",
    "SOLVER.GRAD_CHECKPOINT", "SOLVER.RESUME", "SOLVER.LOG_PERIOD", "SOLVER.CHECKPOINT_PERIOD",
    "EVAL.REPORT",
))  # fmt: skip
# Read where something is scored. A training is moved by one of them: validations choose by it.
_OF_A_TEST = ("TEST.", "EVAL.", "ISED.")
_OF_VALIDATIONS = "TEST.CROSS_CAMERA"
_WEIGHTS = "MODEL.PRETRAIN_PATH"

# A key that is added to the configuration counts until it is named above.
OF_A_RESULT = tuple(key.name for key in KEYS if key.name not in _MOVES_NOTHING)
OF_A_TRAINING = tuple(
    name for name in OF_A_RESULT if name == _OF_VALIDATIONS or not name.startswith(_OF_A_TEST)
)


def moving_values(cfg: CfgNode) -> dict[str, Any]:
    """Return every value that can move a number, by name, as JSON can hold it."""
    values = {name: _plain(get_value(cfg, name)) for name in OF_A_RESULT}
    return values | {_WEIGHTS: _weights(cfg.MODEL.PRETRAIN_PATH)}


def differing(before: CfgNode, now: CfgNode, names: Collection[str] = OF_A_RESULT) -> list[str]:
    """Say which of some keys differ, ``SOLVER.SEED 1 (now 2)``.

    ImageNet weights count by the name of their file, and where data sets lie where one's own is
    named by a path from there.
    """
    from_root = ":" in now.DATASETS.NAMES
    return [
        f"{name} {was} (now {value})"
        for name, (was, value) in changes(before, now).items()
        if (name in names or (from_root and name == "DATASETS.ROOT_DIR"))
        and not (name == _WEIGHTS and _weights(str(was)) == _weights(str(value)))
    ]


def _weights(path: str) -> str:
    """Return which file a MODEL.PRETRAIN_PATH names; '' for the one that is looked for anyway."""
    name = Path(path).name if path.endswith(".pth") else ""
    return "" if name == IMAGENET_FILE else name


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    # JSON has no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
