"""Threshold, text and JSON of the results of `protect.py search`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.details import load_calibration
from engine.vault.keyring import Keyring
from engine.vault.opening import OpenedFile
from engine.vault.search import Gallery, Match, Query, checked_matches, most_similar
from tools.lib.command_line import shown
from utils.errors import UserError


@dataclass(frozen=True)
class Threshold:
    """The lowest similarity of a match."""

    similarity: float | None = None  # the threshold; None to list all results
    # share of genuine and of impostor pairs of the validation split that it accepts
    rates: tuple[float, float] | None = None


@dataclass(frozen=True)
class SearchResult:
    """The result of one query."""

    query: Path
    matches: Sequence[Match]  # results above the threshold, the most similar first
    unusable: Sequence[OpenedFile]  # results whose files cannot be opened
    threshold: Threshold
    highest: float  # highest similarity of the folder, also below the threshold
    searched: int  # images that were compared

    @property
    def false_matches(self) -> float | None:
        """Expected number of images of other persons above the threshold, if its rates are known.

        An upper limit: as if every searched image showed another person.
        """
        rates = self.threshold.rates
        return None if rates is None else rates[1] * self.searched

    def as_json(self) -> dict[str, Any]:
        """Return the content for ``--json``."""
        genuine, impostor = self.threshold.rates or (None, None)
        return {
            "query": str(self.query),
            "searched": self.searched,
            "threshold": self.threshold.similarity,
            "true_positive_rate": genuine,
            "false_positive_rate": impostor,
            "expected_false_matches": self.false_matches,
            "highest_similarity": self.highest,
            "matches": [{**asdict(match), "file": str(match.file)} for match in self.matches],
        }

    def lines(self) -> list[str]:
        """Return the lines for a terminal."""
        lines = [
            f"{rank:4d}  {match.similarity:+.4f}  {shown(f'{match.file}  {match.path}')}"
            for rank, match in enumerate(self.matches, 1)
        ]
        limit = self.threshold.similarity
        if limit is not None and self.highest < limit:
            lines.append(f"no match: highest similarity {self.highest:+.4f}, threshold {limit:.4f}")
        if self.threshold.rates is not None:
            genuine, impostor = self.threshold.rates
            lines.append(
                f"threshold {limit:.4f} accepts {genuine:.1%} of the pairs of one person and "
                f"{impostor:.2%} of the pairs of two persons (validation split); "
                f"expect up to {self.false_matches:.1f} false matches in {self.searched} images"
            )
        return lines


def search_results(
    queries: Sequence[Query],
    gallery: Gallery,
    keyring: Keyring,
    thresholds: Mapping[str, Threshold],
    count: int,
) -> Iterator[SearchResult]:
    """Yield the result of each query: at most ``count`` matches above the threshold of its kind."""
    vectors = torch.stack([query.vector for query in queries])
    best = most_similar(gallery.vectors, vectors, count)
    for query, similarities, rows in zip(queries, *best, strict=True):
        threshold = thresholds[query.kind]
        limit = -math.inf if threshold.similarity is None else threshold.similarity
        accepted = int((similarities >= limit).sum())
        matches, unusable = checked_matches(
            gallery, similarities[:accepted].tolist(), rows[:accepted].tolist(), keyring
        )
        highest = float(similarities[0]) if len(similarities) else -1.0
        yield SearchResult(query.path, matches, unusable, threshold, highest, len(gallery.files))


def threshold_of(
    kind: str, given: float | None, checkpoint: Path, note: Callable[[str], None]
) -> Threshold:
    """Return the given threshold, or that of a checkpoint for a kind of query.

    If the checkpoint has none, all results are listed, and ``note`` is called with a line about it.
    """
    if given is not None:
        return Threshold(given)
    try:
        calibration = load_calibration(checkpoint, kind, "protected")
    except UserError as error:
        note(f"all results are listed, without a threshold: {error}")
        return Threshold()
    return Threshold(calibration.threshold, (calibration.tpr, calibration.fpr))
