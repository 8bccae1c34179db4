"""What an evaluation writes beyond the table, from the features of its one pass.

``details.json`` and ``per_query.csv`` on request, ``calibration.json`` of a validation split.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

from data.records import Sample
from engine.evaluator import Extraction, Scores
from engine.report import DIRECTIONS
from engine.scoring.calibration import Calibration, calibrate
from engine.scoring.features import Features
from engine.scoring.paired import PER_QUERY_NAME, Access
from engine.scoring.score_details import ScoreDetails, score_details
from engine.scoring.verification import score_verification
from utils.errors import UserError
from utils.files import atomic_write, write_text
from utils.logger import get_logger

CALIBRATION_NAME = "calibration.json"
DETAILS_NAME = "details.json"
_CALIBRATED_FPR = 1e-3
_PER_QUERY = (
    "pid", "camid", "num_matches", "first_rank", "last_rank", "average_precision",
    "inverse_negative_penalty",
)  # fmt: skip


def detail_directions(
    found: Extraction, key: str, *, cross_camera: bool, seed: int, reranked: Scores | None = None
) -> dict[str, ScoreDetails]:
    """Score ``raw->raw`` ... ``protected->protected`` in every way.

    Args:
        found: Features of query and gallery.
        key: Key state whose protected images are meant, as in ``results.json``.
        cross_camera: TEST.CROSS_CAMERA.
        seed: Of what is drawn.
        reranked: The same directions after re-ranking, where that was asked for.
    """
    return {
        "->".join(direction): replace(
            score_details(*_features(found, direction, key), cross_camera=cross_camera, seed=seed),
            reranked=None if reranked is None else reranked[_states(direction, key)],
        )
        for direction in DIRECTIONS
    }


def save_details(
    details: Mapping[str, ScoreDetails],
    access: Access,
    query_samples: Sequence[Sample],
    folder: Path,
) -> None:
    """Write ``details.json`` and, a row for each query and direction, ``per_query.csv``.

    Args:
        details: What ``detail_directions`` gave.
        access: How protected images were read.
        query_samples: Samples of the queries.
        folder: OUTPUT_DIR.
    """
    content = {
        name: asdict(access.of(name)) | one.to_json(per_query=False)
        for name, one in details.items()
    }
    _save_json(content, folder / DETAILS_NAME)
    with (
        atomic_write(folder / PER_QUERY_NAME) as temporary,
        # A file name may be no UTF-8: its bytes are written as they are.
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("direction", "key", "scheme", "path", *_PER_QUERY))
        for name, one in details.items():
            queries = one.retrieval.per_query
            columns = [getattr(queries, column).tolist() for column in _PER_QUERY]
            paths = [query_samples[index].path for index in queries.index.tolist()]
            start = (name, *astuple(access.of(name)))
            writer.writerows((*start, *row) for row in zip(paths, *columns, strict=True))


def details_table(details: Mapping[str, ScoreDetails], access: Access) -> str:
    """Return intervals, verification and single-shot rates for a terminal."""
    head = ("rank-1", "mAP", "TPR at FPR 1e-3", "single-shot rank-1")
    lines = [
        f"protected images: {access}",
        f"{'95 % intervals over people':<28}" + "".join(f"{name:>24}" for name in head),
    ]
    for name, one in details.items():
        content = one.to_json(per_query=False)
        cells = (
            content["retrieval"]["rank1"],
            content["retrieval"]["mAP"],
            content["verification"]["tpr_at_fpr"]["0.001"],
            content["single_shot"]["rank1"],
        )
        lines.append(f"  {name:<26}" + "".join(f"{_cell(cell):>24}" for cell in cells))
        if again := content.get("reranked"):
            rates = (f"{_cell(again[score]):>24}" for score in ("rank1", "mAP"))
            lines.append(f"{'    re-ranked':<28}" + "".join(rates))
    return "\n".join(lines)


def calibrations(found: Extraction, *, cross_camera: bool) -> dict[str, Calibration]:
    """Choose a threshold for "same person?" in each direction, on validation features.

    The false positive rate is 1e-3, or the smallest that the number of pairs can show. A direction
    that allows none (degenerate features, too few people) is left out, which the log says.
    """
    chosen = {}
    for direction in DIRECTIONS:
        name = "->".join(direction)
        try:
            pairs = score_verification(
                *_features(found, direction, "none"), cross_camera=cross_camera
            )
            rate = max(_CALIBRATED_FPR, 1 / pairs.num_impostor)
            chosen[name] = calibrate(pairs, false_positive_rate=rate)
        except UserError as error:
            get_logger().warning("No threshold for %s in %s: %s", name, CALIBRATION_NAME, error)
    return chosen


def save_calibrations(chosen: Mapping[str, Calibration], folder: Path) -> None:
    """Write ``calibration.json``, from which ``tools/match.py`` takes its threshold."""
    _save_json({name: asdict(one) for name, one in chosen.items()}, folder / CALIBRATION_NAME)


def _features(found: Extraction, direction: tuple[str, str], key: str) -> tuple[Features, Features]:
    first, second = _states(direction, key)
    return found.query.features[first], found.gallery.features[second]


def _states(direction: tuple[str, str], key: str) -> tuple[str, str]:
    """Return what a direction's features and scores lie under: ``raw``, or the key state."""
    first, second = (key if side == "protected" else "raw" for side in direction)
    return first, second


def _save_json(content: Mapping[str, Any], path: Path) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _cell(interval: Mapping[str, float]) -> str:
    low, high = interval["low"], interval["high"]
    return f"{interval['value']:.1%} [{low:.1%}, {high:.1%}]"
