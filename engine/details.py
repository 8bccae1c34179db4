"""Everything a careful reader asks of one direction, as one record that goes into a JSON file.

What an evaluation writes beyond the table, from the features of its one pass.

``details.json`` and ``per_query.csv`` on request, ``calibration.json`` of a validation split.
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
from engine.results import DIRECTIONS
from engine.scoring.bootstrap import Interval, retrieval_intervals
from engine.scoring.features import Features
from engine.scoring.paired import PER_QUERY_NAME, Access
from engine.scoring.retrieval import RetrievalScores, score_retrieval
from engine.scoring.single_shot import SingleShotScores, score_single_shot
from engine.scoring.verification import (
    Calibration,
    VerificationScores,
    calibrate,
    score_verification,
)
from utils.errors import UserError
from utils.files import atomic_write, write_text
from utils.logger import get_logger

_SUMMARY = ("rank1", "rank5", "rank10", "mAP", "mINP")
_ROC_POINTS = 200


@dataclass(frozen=True, eq=False)
class ScoreDetails:
    """Retrieval, verification and single-shot scores of one query set in one gallery.

    Attributes:
        retrieval: With the results of each query.
        verification: Same person or not, over all pairs.
        single_shot: Galleries with one image a person.
        reranked: Retrieval after re-ranking; None where that was not asked for.
    """

    retrieval: RetrievalScores
    verification: VerificationScores
    single_shot: SingleShotScores
    reranked: RetrievalScores | None = None

    def to_json(self, *, per_query: bool = True) -> dict[str, Any]:
        """Return plain numbers: rates with 95 % intervals over identities, curves, queries.

        Args:
            per_query: Whether to include the results of each query.
        """
        content = dict(self._rates)
        if per_query:
            queries = self.retrieval.per_query
            content["per_query"] = {
                name: getattr(queries, name).tolist() for name in queries.__dataclass_fields__
            }
        return content

    @cached_property
    def _rates(self) -> dict[str, Any]:
        """All of it but the queries; a file and a table are made of one resampling."""
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
            "verification": _verification(self.verification),
        }
        if self.reranked is not None:
            content["reranked"] = _plain(retrieval_intervals(self.reranked), _SUMMARY)
        return content


def score_details(
    query: Features,
    gallery: Features,
    *,
    cross_camera: bool = True,
    memory_mib: float | None = None,
    seed: int = 1,
) -> ScoreDetails:
    """Score one direction in every way.

    Args:
        query: Query set.
        gallery: Gallery.
        cross_camera: Whether images of the query's own camera are ignored.
        memory_mib: Most memory to use besides the features (MiB); None: what is free.
        seed: Of the single-shot galleries.

    Raises:
        UserError: As for ``score_retrieval`` and ``score_verification``.
    """
    return ScoreDetails(
        score_retrieval(query, gallery, cross_camera=cross_camera, memory_mib=memory_mib),
        score_verification(query, gallery, cross_camera=cross_camera, memory_mib=memory_mib),
        score_single_shot(
            query, gallery, seed=seed, cross_camera=cross_camera, memory_mib=memory_mib
        ),
    )


def _plain(intervals: dict[str, Interval], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: asdict(intervals[name]) for name in names}


def _verification(scores: VerificationScores) -> dict[str, Any]:
    false, true, threshold = scores.roc()
    # Points evenly spaced on a logarithmic axis, where the strict end of the curve can be seen.
    rates = np.geomspace(1 / scores.num_impostor, 1.0, _ROC_POINTS)
    points = np.unique(np.searchsorted(false, rates * (1 + 1e-12), side="right") - 1)
    return {
        "num_genuine": scores.num_genuine,
        "num_impostor": scores.num_impostor,
        "tpr_at_fpr": {f"{rate:g}": asdict(one) for rate, one in scores.tpr_intervals().items()},
        **{name: asdict(one) for name, one in scores.curve_intervals().items()},
        "roc": {
            "fpr": false[points].tolist(),
            "tpr": true[points].tolist(),
            "threshold": np.minimum(threshold[points], 1.0).tolist(),
        },
    }


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
