"""Everything a careful reader asks of one direction, as one record that goes into a JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from engine.scoring.bootstrap import Interval, retrieval_intervals
from engine.scoring.features import Features
from engine.scoring.retrieval import RetrievalScores, score_retrieval
from engine.scoring.single_shot import SingleShotScores, score_single_shot
from engine.scoring.verification import VerificationScores, score_verification

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
