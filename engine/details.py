"""Files of an evaluation in addition to ``results.json``, from the features of its one pass.

``details.json`` and ``per_query.csv`` (EVAL.DETAILS), and ``calibration.json`` of a validation
split.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.records import Sample
from engine.evaluation import Extraction, Scores
from engine.report import DIRECTIONS
from engine.scoring.features import Features
from engine.scoring.intervals import PER_QUERY_NAME, Access, Interval, retrieval_intervals
from engine.scoring.retrieval import RetrievalScores, score_retrieval
from engine.scoring.single_shot import SingleShotScores, score_single_shot
from engine.scoring.verification import (
    Calibration,
    NoImpostorPairs,
    VerificationScores,
    calibrate,
    score_verification,
)
from utils.errors import UserError
from utils.files import atomic_write, write_text
from utils.logger import Progress, get_logger

CALIBRATION_NAME = "calibration.json"
# If validation can accept no pair, its threshold is one bin above 1.
HIGHEST_THRESHOLD = 1.00001
DETAILS_NAME = "details.json"

_SUMMARY = ("rank1", "rank5", "rank10", "mAP", "mINP")
_ROC_POINTS = 200
_CALIBRATED_FPR = 1e-3
_PER_QUERY = (
    "pid", "camid", "num_matches", "first_rank", "last_rank", "average_precision",
    "inverse_negative_penalty",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ScoreDetails:
    """Retrieval, verification and single-shot scores of one query set in one gallery."""

    retrieval: RetrievalScores  # with the result of each query
    # whether two images show the same identity, over all pairs; None if no pair shows different
    # ones
    verification: VerificationScores | None
    single_shot: SingleShotScores  # retrieval in galleries with one image of each identity
    # retrieval after re-ranking; None if it was not asked for
    reranked: RetrievalScores | None = None

    @cached_property
    def rates(self) -> dict[str, Any]:
        """Plain numbers: rates with 95 % intervals over identities, and curves.

        Cached, so that file and table show the same resampling.
        """
        retrieval = retrieval_intervals(self.retrieval)
        single = self.single_shot.intervals()
        content: dict[str, Any] = {
            "degenerate": self.retrieval.degenerate,
            "num_queries": self.retrieval.num_queries,
            "num_gallery": self.retrieval.num_gallery,
            "skipped": self.retrieval.skipped,
            "cross_camera": self.retrieval.cross_camera,
            "retrieval": _plain(retrieval, _SUMMARY) | {"cmc": self.retrieval.cmc.tolist()},
            "single_shot": _plain(single, _SUMMARY[:3])
            | {
                "cmc": self.single_shot.cmc.tolist(),
                "num_identities": self.single_shot.num_identities,
                "draws": self.single_shot.ranks.shape[1],
            },
            "verification": None if self.verification is None else _verification(self.verification),
        }
        if self.reranked is not None:
            content["reranked"] = _plain(retrieval_intervals(self.reranked), _SUMMARY)
        return content


def score_details(
    query: Features, gallery: Features, *, cross_camera: bool = True, seed: int = 1
) -> ScoreDetails:
    """Return the retrieval, verification and single-shot scores of one direction.

    ``seed`` draws the single-shot galleries. For the other arguments and errors see
    ``score_retrieval``.
    """
    try:
        verification = score_verification(query, gallery, cross_camera=cross_camera)
    except NoImpostorPairs as error:
        get_logger().warning("Verification rates are left out of the details: %s", error)
        verification = None
    return ScoreDetails(
        score_retrieval(query, gallery, cross_camera=cross_camera),
        verification,
        score_single_shot(query, gallery, seed=seed, cross_camera=cross_camera),
    )


def _plain(intervals: dict[str, Interval], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: asdict(intervals[name]) for name in names}


def _verification(scores: VerificationScores) -> dict[str, Any]:
    false, true, threshold = scores.roc()
    # Evenly spaced on a logarithmic axis, which shows the curve at low false positive rates.
    rates = np.geomspace(1 / scores.num_impostor, 1.0, _ROC_POINTS)
    points = np.unique(np.searchsorted(false, rates * (1 + 1e-12), side="right") - 1)
    return {
        "num_genuine": scores.num_genuine,
        "num_impostor": scores.num_impostor,
        "tpr_at_fpr": {f"{rate:g}": asdict(tpr) for rate, tpr in scores.tpr_intervals().items()},
        **{name: asdict(interval) for name, interval in scores.curve_intervals().items()},
        "roc": {
            "fpr": false[points].tolist(),
            "tpr": true[points].tolist(),
            "threshold": np.minimum(threshold[points], 1.0).tolist(),
        },
    }


def detail_directions(
    extraction: Extraction,
    key: str,
    *,
    cross_camera: bool,
    seed: int = 1,
    reranked: Scores | None = None,
) -> dict[str, ScoreDetails]:
    """Return the detailed scores of ``raw->raw`` ... ``protected->protected``.

    Args:
        extraction: Features of query and gallery.
        key: Key state of the protected images, as in ``results.json``.
        cross_camera: As for ``score_details``.
        seed: As for ``score_details``.
        reranked: Scores of the same directions after re-ranking, if it was asked for.
    """
    return {
        "->".join(direction): replace(
            score_details(
                *_features(extraction, direction, key), cross_camera=cross_camera, seed=seed
            ),
            reranked=None if reranked is None else reranked[_states(direction, key)],
        )
        for direction in Progress.over(DIRECTIONS, "Details", unit="direction")
    }


def save_details(
    details: Mapping[str, ScoreDetails],
    access: Access,
    query_samples: Sequence[Sample],
    folder: Path,
) -> None:
    """Write ``details.json``, and ``per_query.csv`` with a row for each query and direction."""
    content = {name: asdict(access.of(name)) | scores.rates for name, scores in details.items()}
    _save_json(content, folder / DETAILS_NAME)
    with (
        atomic_write(folder / PER_QUERY_NAME) as temporary,
        # File names need not be UTF-8; their bytes are written unchanged.
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("direction", "key", "scheme", "path", *_PER_QUERY))
        for name, scores in details.items():
            queries = scores.retrieval.per_query
            columns = [getattr(queries, column).tolist() for column in _PER_QUERY]
            paths = [query_samples[index].path for index in queries.index.tolist()]
            same = (name, *astuple(access.of(name)))
            writer.writerows((*same, *row) for row in zip(paths, *columns, strict=True))


def details_table(details: Mapping[str, ScoreDetails], access: Access) -> str:
    """Return the main rates with their intervals as a table for a terminal."""
    head = ("rank-1", "mAP", "TPR at FPR 1e-3", "single-shot rank-1")
    lines = [
        f"protected images: {access}",
        f"{'95 % intervals over people':<28}" + "".join(f"{name:>24}" for name in head),
    ]
    for name, scores in details.items():
        content = scores.rates
        verification = content["verification"]
        cells = (
            content["retrieval"]["rank1"],
            content["retrieval"]["mAP"],
            verification and verification["tpr_at_fpr"]["0.001"],
            content["single_shot"]["rank1"],
        )
        lines.append(f"  {name:<26}" + "".join(f"{_cell(cell):>24}" for cell in cells))
        if reranked := content.get("reranked"):
            rates = (f"{_cell(reranked[score]):>24}" for score in ("rank1", "mAP"))
            lines.append(f"{'    re-ranked':<28}" + "".join(rates))
    return "\n".join(lines)


def calibrations(extraction: Extraction, *, cross_camera: bool) -> dict[str, Calibration]:
    """Return a threshold for "same identity" in each direction, from validation features.

    The false positive rate is 1e-3, or the smallest that the number of pairs can show. A direction
    that has no threshold (degenerate features, too few identities) is left out with a log line.
    """
    thresholds = {}
    for direction in DIRECTIONS:
        name = "->".join(direction)
        try:
            pairs = score_verification(
                *_features(extraction, direction, "none"), cross_camera=cross_camera
            )
            rate = max(_CALIBRATED_FPR, 1 / pairs.num_impostor)
            thresholds[name] = calibrate(pairs, false_positive_rate=rate)
        except UserError as error:
            get_logger().warning("No threshold for %s in %s: %s", name, CALIBRATION_NAME, error)
    return thresholds


def save_calibrations(thresholds: Mapping[str, Calibration], folder: Path) -> None:
    """Write ``calibration.json``, for `load_calibration`."""
    content = {name: asdict(threshold) for name, threshold in thresholds.items()}
    _save_json(content, folder / CALIBRATION_NAME)


def load_calibration(folder: Path, query: str, gallery: str) -> Calibration:
    """Return the threshold of validation for two kinds of image, each ``raw`` or ``protected``.

    Raises:
        UserError: The folder has no calibration, or the file is damaged.
    """
    path = folder / CALIBRATION_NAME
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; expected the OUTPUT_DIR of a training with a validation "
            "split, or --threshold"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))[f"{query}->{gallery}"]
        calibration = Calibration(**content)
        if not -1 <= calibration.threshold <= HIGHEST_THRESHOLD:
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has no threshold for {query}->{gallery}; set it with --threshold"
        ) from error
    return calibration


def _features(
    extraction: Extraction, direction: tuple[str, str], key: str
) -> tuple[Features, Features]:
    query, gallery = _states(direction, key)
    return extraction.query.features[query], extraction.gallery.features[gallery]


def _states(direction: tuple[str, str], key: str) -> tuple[str, str]:
    """Return under which names features and scores of a direction are stored: raw or key state."""
    query, gallery = (key if side == "protected" else "raw" for side in direction)
    return query, gallery


def _save_json(content: Mapping[str, Any], path: Path) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _cell(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "-"
    low, high = interval["low"], interval["high"]
    return f"{interval['value']:.1%} [{low:.1%}, {high:.1%}]"
