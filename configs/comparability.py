"""Keys that can change a number: which results may be compared or reused."""

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

# Folders, devices, workers, memory, speed and logging: numbers stay the same, up to rounding. Parts
# of two folders do count: see ``differing``.
_NO_EFFECT = frozenset((
    "MODEL.DEVICE", "MODEL.DEVICE_ID", "DATASETS.ROOT_DIR", "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS", "CACHE.MODE", "CACHE.LIMIT_MIB", "TEST.IMS_PER_BATCH",
    "RUNTIME.CHANNELS_LAST", "RUNTIME.COMPILE", "RUNTIME.CUDNN_BENCHMARK", "RUNTIME.THREADS",
    "SOLVER.GRAD_CHECKPOINT", "SOLVER.RESUME", "SOLVER.LOG_PERIOD", "SOLVER.CHECKPOINT_PERIOD",
    "EVAL.REPORT",
    "EVAL.IMAGES", "RUNTIME.TRACKERS",
))  # fmt: skip
# Keys of an evaluation. One of them affects a training: its validations choose the best weights.
_OF_A_TEST = ("TEST.", "EVAL.", "ISED.")
_OF_VALIDATIONS = "TEST.CROSS_CAMERA"
_WEIGHTS = "MODEL.PRETRAIN_PATH"

# A new key of the configuration counts unless it is named above.
OF_A_RESULT = tuple(key.name for key in KEYS if key.name not in _NO_EFFECT)
OF_A_TRAINING = tuple(
    name for name in OF_A_RESULT if name == _OF_VALIDATIONS or not name.startswith(_OF_A_TEST)
)


def moving_values(cfg: CfgNode) -> dict[str, Any]:
    """Return every value that can change a number, by name, as JSON types."""
    values = {name: _plain(get_value(cfg, name)) for name in OF_A_RESULT}
    return values | {_WEIGHTS: _weights(cfg.MODEL.PRETRAIN_PATH)}


def differing(before: CfgNode, now: CfgNode, names: Collection[str] = OF_A_RESULT) -> list[str]:
    """Return the values that differ, as ``SOLVER.SEED 1 (now 2)``.

    ImageNet weights are compared by the name of their file. DATASETS.ROOT_DIR is compared only if
    the data set is given as a path relative to it.

    Args:
        before: Old configuration.
        now: New configuration.
        names: Keys that are compared.
    """
    from_root = ":" in now.DATASETS.NAMES
    return [
        f"{name} {old} (now {new})"
        for name, (old, new) in changes(before, now).items()
        if (name in names or (from_root and name == "DATASETS.ROOT_DIR"))
        and not (name == _WEIGHTS and _weights(str(old)) == _weights(str(new)))
    ]


def _weights(path: str) -> str:
    """Return the file name of a MODEL.PRETRAIN_PATH; '' for the file that is the default."""
    name = Path(path).name if path.endswith(".pth") else ""
    return "" if name == IMAGENET_FILE else name


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    # JSON has no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
