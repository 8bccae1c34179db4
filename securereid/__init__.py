"""SecureReID from Python: the names that programs use, loaded when they are first used.

- ``load_config(config_file, overrides)``: a checked configuration (``configs.loading.load``).
- ``train(cfg)``, ``evaluate(cfg)``: what the commands do; return the report of the evaluation.
- ``Anonymizer``: anonymize, recover and embed images with a trained model (``engine.api``).
- ``Keyring``: keys of subjects (``engine.vault.keyring``).
- ``Features``, ``score_retrieval``: CMC, mAP and mINP of any embeddings (``engine.scoring``).

Example:
    >>> import torch
    >>> from securereid import Features, score_retrieval
    >>> identities, cameras = torch.tensor([1, 2]), torch.tensor([0, 0])
    >>> query = Features(torch.eye(2), identities, cameras)
    >>> gallery = Features(torch.eye(2), identities, cameras + 1)
    >>> score_retrieval(query, gallery).rank1
    1.0
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yacs.config import CfgNode

    from configs.loading import load as load_config
    from engine.api import Anonymizer
    from engine.report import EvalReport
    from engine.scoring.features import Features
    from engine.scoring.retrieval import score_retrieval
    from engine.vault.keyring import Keyring

__all__ = [
    "Anonymizer",
    "Features",
    "Keyring",
    "evaluate",
    "load_config",
    "score_retrieval",
    "train",
]

_HOMES = {
    "Anonymizer": ("engine.api", "Anonymizer"),
    "Features": ("engine.scoring.features", "Features"),
    "Keyring": ("engine.vault.keyring", "Keyring"),
    "load_config": ("configs.loading", "load"),
    "score_retrieval": ("engine.scoring.retrieval", "score_retrieval"),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch takes seconds to load."""
    if name not in _HOMES:
        raise AttributeError(f"module 'securereid' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def train(cfg: CfgNode) -> EvalReport | None:
    """Train a model and evaluate its best checkpoint; write everything to OUTPUT_DIR.

    Return the report, or None in all processes but the first of a distributed run.
    """
    return _run(cfg, "off")


def evaluate(cfg: CfgNode) -> EvalReport | None:
    """Evaluate the checkpoint in MODEL.PRETRAIN_DIR, with MODEL.PRETRAIN_CHOICE self.

    Write the results to OUTPUT_DIR. Return the report, or None as in `train`.
    """
    return _run(cfg, "on")


def _run(cfg: CfgNode, evaluate_only: str) -> EvalReport | None:
    from tools.main import run
    from utils.config_tree import changed

    return run(changed(cfg, {"TEST.EVALUATE_ONLY": evaluate_only}))
