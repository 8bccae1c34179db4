"""The evaluator: one pass of the networks over a split, from which every score is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data.loaders import EvalLoader
from data.records import Batch, Sample
from engine.distributed.processes import all_gather, from_main, gather_rows, world
from engine.report import DIRECTIONS, EvalReport, RetrievalRow
from engine.scoring.features import Features
from engine.scoring.image_quality import ImageQuality, QualityAccumulator
from engine.scoring.reranking import score_reranked
from engine.scoring.retrieval import RetrievalScores, score_directions
from engine.views import ViewMaker, Views
from layers.pixels import PixelSpace
from utils.device import uncompiled
from utils.logger import Progress

# Key: (query, gallery), each ``raw`` or the key state of protected images.
Scores = dict[tuple[str, str], RetrievalScores]


@dataclass(frozen=True)
class Side:
    """Features of the query or the gallery."""

    features: dict[str, Features]  # features of the images by ``raw`` or key state
    refused: dict[str, int]  # number of images that could not be opened, by key state


@dataclass(frozen=True)
class Extraction:
    """The result of one pass over a split, from which every score is computed."""

    query: Side
    gallery: Side
    image_quality: dict[str, ImageQuality]  # quality against raw, by kind of image


@dataclass
class _Share:
    """The images of query or gallery that one process ran, in their order."""

    # batches (B, D) by ``raw`` or key state
    embeddings: dict[str, list[Tensor]] = field(default_factory=dict)
    pids: list[Tensor] = field(default_factory=list)  # of each batch (B,)
    camids: list[Tensor] = field(default_factory=list)  # of each batch (B,)
    # number of images that could not be opened, by key state
    refused: dict[str, int] = field(default_factory=dict)
    # quality against raw, by kind of image
    quality: dict[str, QualityAccumulator] = field(default_factory=dict)

    def side(self) -> Side:
        """Return the features as one tensor per key state."""
        pid, camid = torch.cat(self.pids), torch.cat(self.camids)
        features = {
            state: Features(torch.cat(parts), pid, camid)
            for state, parts in self.embeddings.items()
        }
        return Side(features, self.refused)


@dataclass(frozen=True)
class Scored:
    """The scores of every direction under every key state."""

    plain: Scores  # ranked by distance
    reranked: Scores | None  # after k-reciprocal re-ranking; None if it was not asked for


@dataclass(frozen=True)
class Evaluator:
    """Scores one split of one data set."""

    views: ViewMaker  # returns the views of a batch
    networks: nn.Module  # all networks in use; set to evaluation mode
    query: EvalLoader  # images in order; in a distributed run, this process's share
    gallery: EvalLoader  # the same for the gallery
    query_samples: Sequence[Sample]  # the queries that are scored, of all processes
    pixels: PixelSpace  # pixel space of the images
    autocast: Callable[[], AbstractContextManager[object]]  # context that the networks run in
    template: EvalReport  # report with everything that does not depend on the scores
    cross_camera: bool = True  # whether gallery images of the query's own camera are ignored
    re_ranking: bool = False  # whether to add re-ranked rows

    def evaluate(self, epoch: int) -> EvalReport:
        """Return the report of the current weights, which are those of ``epoch``.

        In a distributed run the first process scores the features of all, and sends them the
        report.
        """
        extraction = self.extract()
        return from_main(lambda: self.report(extraction, self.score(extraction), epoch))

    @torch.inference_mode()
    def extract(self) -> Extraction:
        """Run the networks over the split once, and return features and image quality.

        In a distributed run each process runs its share. Only the first process gets the result of
        all; the results of the others are not complete.
        """
        was_training = self.networks.training
        self.networks.eval()
        try:
            with uncompiled():  # a few seconds of work, with other batch sizes than in training
                query, gallery = (
                    self._pass(self.query, "query"),
                    self._pass(self.gallery, "gallery"),
                )
        finally:
            self.networks.train(was_training)
        quality: dict[str, QualityAccumulator] = {}
        for share in (query, gallery):
            for kind, accumulator in share.quality.items():
                quality.setdefault(kind, QualityAccumulator()).add(accumulator)
        results = {kind: images.result() for kind, images in quality.items() if len(images)}
        return Extraction(query.side(), gallery.side(), results)

    def score(self, extraction: Extraction) -> Scored:
        """Return the scores of every direction under every key state."""
        query, gallery = extraction.query, extraction.gallery
        plain = self._scores(query, gallery)
        return Scored(plain, self._reranked(query, gallery, plain) if self.re_ranking else None)

    def report(self, extraction: Extraction, scored: Scored, epoch: int) -> EvalReport:
        """Return the report of a pass and its scores."""
        query, gallery, reranked = extraction.query, extraction.gallery, scored.reranked
        return replace(
            self.template,
            epoch=epoch,
            retrieval=_rows(query, gallery, scored.plain),
            reranked=_rows(query, gallery, reranked) if reranked else (),
            image_quality=extraction.image_quality,
        )

    def _pass(self, loader: EvalLoader, name: str) -> _Share:
        """Run the networks over one side once."""
        share = _Share()
        with Progress(loader.num_images, f"Evaluate {name}") as bar:
            for batch in loader:
                views = self._views(batch, loader.samples, share.embeddings)
                raw = self.pixels.denormalize(batch.raw)
                for kind, images in views.kinds.items():
                    accumulator = share.quality.setdefault(kind, QualityAccumulator())
                    accumulator.update(raw, self.pixels.denormalize(images))
                _add_counts(share.refused, views.num_refused)
                share.pids.append(batch.pid)
                share.camids.append(batch.camid)
                bar.update(len(batch))
        return _gathered(share)

    def _views(
        self, batch: Batch, samples: Sequence[Sample], embeddings: dict[str, list[Tensor]]
    ) -> Views:
        """Run the networks on one batch; add its embeddings to ``embeddings``."""
        subjects = [samples[index].subject for index in batch.index.tolist()]
        with self.autocast():
            views = self.views(batch, subjects)
            done: dict[int, Tensor] = {}  # two key states may have the same images
            for state, images in {"raw": batch.raw, **views.protected}.items():
                if id(images) not in done:
                    done[id(images)] = self.views.reid.embed(images)
                embeddings.setdefault(state, []).append(done[id(images)])
        return views

    def _scores(self, query: Side, gallery: Side) -> Scores:
        """Return the scores of every direction under every key state; raw->raw involves no key."""
        raw = {"raw": gallery.features["raw"]}
        scores = score_directions(query.features, raw, cross_camera=self.cross_camera)
        for key in (state for state in query.features if state != "raw"):
            queries = {"raw": query.features["raw"], key: query.features[key]}
            galleries = {key: gallery.features[key]}
            scores |= score_directions(queries, galleries, cross_camera=self.cross_camera)
        return scores

    def _reranked(self, query: Side, gallery: Side, scores: Scores) -> Scores:
        """Return the scores of the same directions after k-reciprocal re-ranking."""
        return {
            (first, second): score_reranked(
                query.features[first], gallery.features[second], cross_camera=self.cross_camera
            )
            for first, second in scores
        }


def _rows(query: Side, gallery: Side, scores: Scores) -> tuple[RetrievalRow, ...]:
    """Return a row for every score, by key state and direction."""
    rows = []
    for key in (state for state in query.features if state != "raw"):
        refused = bool(query.refused.get(key, 0) + gallery.refused.get(key, 0))
        for direction in DIRECTIONS:
            first, second = (key if side == "protected" else "raw" for side in direction)
            if (first, second) != ("raw", "raw"):
                rows.append(RetrievalRow.of(direction, key, scores[first, second], refused=refused))
            elif key == "none":
                rows.append(RetrievalRow.of(direction, key, scores[first, second]))
    return tuple(rows)


def _gathered(own: _Share) -> _Share:
    """Return the shares of all processes, in the order of ranks, on the first process.

    The other processes get their own share, with empty tensors if it had no images.
    """
    if world().size == 1:
        return own
    # A process without images does not know key states, kinds of images or the size of a row.
    shapes = {state: (parts[0].shape[1], parts[0].dtype) for state, parts in own.embeddings.items()}
    descriptions = all_gather((shapes, list(own.quality), own.refused))
    shapes = next(shapes for shapes, _, _ in descriptions if shapes)
    kinds = next(kinds for _, kinds, _ in descriptions if kinds)
    refused: dict[str, int] = {}
    for _, _, counts in descriptions:
        _add_counts(refused, counts)
    no_number = torch.zeros(0, dtype=torch.int64)
    return _Share(
        {
            state: [gather_rows(_joined(own.embeddings.get(state), torch.zeros(0, size, dtype=of)))]
            for state, (size, of) in shapes.items()
        },
        [gather_rows(_joined(own.pids, no_number))],
        [gather_rows(_joined(own.camids, no_number))],
        refused,
        {
            kind: QualityAccumulator(
                [gather_rows(own.quality.get(kind, QualityAccumulator()).rows())]
            )
            for kind in kinds
        },
    )


def _joined(parts: list[Tensor] | None, empty: Tensor) -> Tensor:
    return torch.cat(parts) if parts else empty


def _add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count
