"""What the output folder of a training, an evaluation or an attack contains."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.loading import recorded_values
from engine.report import RESULTS_NAME
from utils.errors import UserError
from utils.metric_writer import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """What an output folder contains."""

    folder: Path  # the folder
    # values by dotted key, as ``config.yml`` records them
    config: Mapping[str, Any] = field(default_factory=dict)
    # content of ``results.json``; empty without an evaluation
    results: Mapping[str, Any] = field(default_factory=dict)
    # content of ``details.json``; empty without EVAL.DETAILS
    details: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()  # records of ``metrics.jsonl``, in order
    # content of the attacks' ``results.json``; empty without attacks
    attacks: Mapping[str, Any] = field(default_factory=dict)
    attack_folder: Path | None = None  # where that file is

    @property
    def dataset(self) -> str:
        """The data set's name, or '' if no file contains it."""
        settings = self.attacks.get("settings", {})
        names = self.config.get("DATASETS.NAMES") or settings.get("DATASETS.NAMES")
        return str(self.results.get("dataset") or names or "")


def is_of_real_people(dataset: str) -> bool:
    """Return whether a data set may show real people: all but the synthetic set do."""
    return dataset.removesuffix("_val") != "synthetic"


def read_run(folder: Path) -> RunFiles:
    """Read the files of a training, an evaluation or an attack.

    Args:
        folder: Its output folder. Attacks may be in the folder itself or in ``attacks`` below it.

    Raises:
        UserError: The folder contains none of these files, or one is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected the output folder of a run")
    config = folder / "config.yml"
    results = _read_json(folder / RESULTS_NAME)
    attack_folder = folder if "settings" in results else folder / "attacks"
    attacks = _read_json(attack_folder / RESULTS_NAME)
    if attack_folder == folder:
        results = {}
    metrics = read_metrics(folder / "metrics.jsonl")
    if not (results or metrics or attacks):
        raise UserError(
            f"{folder} contains no {RESULTS_NAME} and no metrics.jsonl; expected the output folder "
            "of a training, an evaluation or an attack"
        )
    details = _read_json(folder / "details.json")
    return RunFiles(
        folder,
        recorded_values(config) if config.exists() else {},
        results,
        details,
        metrics,
        attacks,
        attack_folder if attacks else None,
    )


def by_epoch(metrics: Iterable[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Return the mean of a metric in each epoch."""
    values: dict[int, list[float]] = {}
    for record in metrics:
        value = record.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values.setdefault(int(record["epoch"]), []).append(float(value))
    return {epoch: sum(numbers) / len(numbers) for epoch, numbers in sorted(values.items())}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; empty if it does not exist."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it or make it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object; delete it or make it again")
    return content
