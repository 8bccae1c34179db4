"""More than the table: intervals, verification rates, single-shot scores, per-query results.

Made from the features of one pass (``engine.evaluator.Extraction``) for the published directions.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.records import Sample
from engine.bootstrap import Interval, retrieval_intervals
from engine.evaluator import Extraction
from engine.report import DIRECTIONS
from engine.retrieval import Features, RetrievalScores, score_retrieval
from engine.single_shot import score_single_shot
from engine.verification import Calibration, calibrate, score_verification
from utils.files import atomic_write

CALIBRATION_NAME = "calibration.json"
_RATES = ("rank1", "rank5", "rank10", "mAP", "mINP")


@dataclass(frozen=True)
class Details:
    """What is known of each direction beyond the table; rates in [0, 1].

    Attributes:
        by_direction: For ``raw->protected`` and so on: the rates with 95 % bootstrap intervals over
            identities, true positive rates at false positive rates, area under the ROC, equal
            error rate and single-gallery-shot rank-1.
        per_query: A row for each scored query and direction.
    """

    by_direction: dict[str, dict[str, Any]]
    per_query: tuple[dict[str, Any], ...]

    def save(self, folder: Path) -> None:
        """Write ``details.json`` and ``per_query.csv`` atomically."""
        with atomic_write(folder / "details.json") as temporary:
            temporary.write_text(json.dumps(self.by_direction, indent=2) + "\n", encoding="utf-8")
        with (
            atomic_write(folder / "per_query.csv") as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, list(self.per_query[0]))
            writer.writeheader()
            writer.writerows(self.per_query)

    def table(self) -> str:
        """Return the intervals and verification rates for a terminal."""
        lines = [
            f"{'95 % intervals over identities':<30}{'rank-1':>22}{'mAP':>22}"
            f"{'TPR at FPR 1e-3':>24}{'single shot':>14}"
        ]
        for name, found in self.by_direction.items():
            cells = [_cell(found["intervals"][rate]) for rate in ("rank1", "mAP")]
            cells.append(_cell(found["tpr_at_fpr"]["0.001"]))
            shot = f"{found['single_shot_rank1']['value']:.1%}"
            lines.append(f"  {name:<28}{cells[0]:>22}{cells[1]:>22}{cells[2]:>24}{shot:>14}")
        return "\n".join(lines)


def make_details(
    found: Extraction, key: str, query_samples: Sequence[Sample], *, cross_camera: bool, seed: int
) -> Details:
    """Score the four directions in full.

    Args:
        found: Features of query and gallery.
        key: Key state whose protected images are meant, as in ``results.json``.
        query_samples: The query images, in the order of the query features.
        cross_camera: TEST.CROSS_CAMERA.
        seed: Of everything drawn.
    """
    by_direction, per_query = {}, []
    for direction in DIRECTIONS:
        query, gallery = features_of(found, direction, key)
        scores = score_retrieval(query, gallery, cross_camera=cross_camera)
        name = "->".join(direction)
        by_direction[name] = _direction(query, gallery, scores, cross_camera, seed)
        per_query += _query_rows(name, scores, query_samples)
    return Details(by_direction, tuple(per_query))


def features_of(
    found: Extraction, direction: tuple[str, str], key: str
) -> tuple[Features, Features]:
    """Return query and gallery features of a direction under a key state."""
    first, second = (key if side == "protected" else "raw" for side in direction)
    return found.query.features[first], found.gallery.features[second]


def _direction(
    query: Features, gallery: Features, scores: RetrievalScores, cross_camera: bool, seed: int
) -> dict[str, Any]:
    intervals = retrieval_intervals(scores, seed=seed)
    pairs = score_verification(query, gallery, cross_camera=cross_camera)
    shot = score_single_shot(query, gallery, cross_camera=cross_camera, seed=seed)
    return {
        "intervals": {name: asdict(intervals[name]) for name in _RATES},
        "tpr_at_fpr": {
            f"{rate:g}": asdict(one) for rate, one in pairs.tpr_intervals(seed=seed).items()
        },
        "area_under_roc": pairs.area_under_roc(),
        "equal_error_rate": pairs.equal_error_rate(),
        "num_genuine_pairs": pairs.num_genuine,
        "num_impostor_pairs": pairs.num_impostor,
        "single_shot_rank1": asdict(shot.intervals(seed=seed)["rank1"]),
        "single_shot_gallery": shot.num_identities,
        "bootstrap": {"level": 0.95, "over": "query identities", "seed": seed},
    }


def _query_rows(
    direction: str, scores: RetrievalScores, samples: Sequence[Sample]
) -> list[dict[str, Any]]:
    found = scores.per_query
    return [
        {
            "direction": direction,
            "path": samples[int(found.index[i])].path,
            "pid": int(found.pid[i]),
            "camid": int(found.camid[i]),
            "num_matches": int(found.num_matches[i]),
            "first_rank": int(found.first_rank[i]),
            "last_rank": int(found.last_rank[i]),
            "average_precision": float(found.average_precision[i]),
            "inverse_negative_penalty": float(found.inverse_negative_penalty[i]),
        }
        for i in range(len(found))
    ]


def calibrations(found: Extraction, *, cross_camera: bool) -> dict[str, Calibration]:
    """Choose a threshold for "same person?" in each direction, on validation features.

    The false positive rate is 1e-3, or the smallest that the number of pairs can show.
    """
    chosen = {}
    for direction in DIRECTIONS:
        pairs = score_verification(
            *features_of(found, direction, "none"), cross_camera=cross_camera
        )
        if not pairs.degenerate:
            rate = max(1e-3, 1 / pairs.num_impostor)
            chosen["->".join(direction)] = calibrate(pairs, false_positive_rate=rate)
    return chosen


def save_calibrations(chosen: Mapping[str, Calibration], folder: Path) -> None:
    """Write ``calibration.json`` for ``tools/match.py``."""
    content = {name: asdict(one) for name, one in chosen.items()}
    with atomic_write(folder / CALIBRATION_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cell(interval: Mapping[str, float] | Interval) -> str:
    one = interval if isinstance(interval, Interval) else Interval(**interval)
    return f"{one.value:.1%} [{one.low:.1%}, {one.high:.1%}]"
