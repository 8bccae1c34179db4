"""Score a model: one pass over the images feeds every direction, key state and image quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.loaders import EvalLoader
from data.records import Batch, Sample
from engine.distributed.processes import from_main
from engine.distributed.share import Share, gathered
from engine.report import DIRECTIONS, EvalReport, RetrievalRow
from engine.scoring.image_quality import ImageQuality, QualityAccumulator
from engine.scoring.reranking import score_reranked
from engine.scoring.retrieval import Features, RetrievalScores, score_directions
from engine.views import ViewMaker, Views
from layers.pixels import PixelSpace
from utils.compiling import uncompiled
from utils.progress import Progress

# By what query and gallery are: ``raw``, or the key state of a protected image.
Scores = dict[tuple[str, str], RetrievalScores]


@dataclass(frozen=True)
class Side:
    """Query or gallery after the pass.

    Attributes:
        features: By what the re-ID network was given: ``raw``, or a key state.
        refused: How many images each key state's holder could not open.
    """

    features: dict[str, Features]
    refused: dict[str, int]


@dataclass(frozen=True)
class Extraction:
    """What one pass over the images of a split gives; every score is made from it.

    Attributes:
        query, gallery: Features of both sides.
        image_quality: Against raw, by kind of image.
    """

    query: Side
    gallery: Side
    image_quality: dict[str, ImageQuality]


@dataclass(frozen=True)
class Scored:
    """Every direction under every key state.

    Attributes:
        plain: By distance.
        reranked: After k-reciprocal re-ranking; None where it was not asked for.
    """

    plain: Scores
    reranked: Scores | None


@dataclass(frozen=True)
class Evaluator:
    """Scores one split of one data set.

    Attributes:
        views: Makes the images of a batch.
        networks: Every network in use; put into evaluation mode.
        query, gallery: Images of the split, in order; of several processes, this one's share.
        query_samples: The queries that are scored, of all processes.
        pixels: Pixel space of the images.
        autocast: Context that the networks run in.
        template: Report with everything that does not depend on the scores.
        cross_camera: TEST.CROSS_CAMERA.
        re_ranking: Whether to add re-ranked rows.
    """

    views: ViewMaker
    networks: nn.Module
    query: EvalLoader
    gallery: EvalLoader
    query_samples: Sequence[Sample]
    pixels: PixelSpace
    autocast: Callable[[], AbstractContextManager[object]]
    template: EvalReport
    cross_camera: bool = True
    re_ranking: bool = False

    def evaluate(self, epoch: int) -> EvalReport:
        """Return the report of the current weights, which are those of ``epoch``.

        Of several processes the first scores what all have found; all get its report.
        """
        found = self.extract()
        return from_main(lambda: self.report(found, self.score(found), epoch))

    @torch.inference_mode()
    def extract(self) -> Extraction:
        """Run the networks over the split, once.

        Of several processes each runs its share, and the first gets everything; what the others
        get is of no use.
        """
        was_training = self.networks.training
        self.networks.eval()
        quality: dict[str, QualityAccumulator] = {}
        try:
            with uncompiled():  # a few seconds of work, with batches of other sizes
                query = self._pass(self.query, quality, "query")
                gallery = self._pass(self.gallery, quality, "gallery")
        finally:
            self.networks.train(was_training)
        return Extraction(query, gallery, {kind: one.result() for kind, one in quality.items()})

    def score(self, found: Extraction) -> Scored:
        """Score what a pass found, in every direction and under every key state."""
        plain = self._scores(found.query, found.gallery)
        again = self._rescored(found.query, found.gallery, plain) if self.re_ranking else None
        return Scored(plain, again)

    def report(self, found: Extraction, scored: Scored, epoch: int) -> EvalReport:
        """Return the report of what a pass found and how it was scored."""
        query, gallery, again = found.query, found.gallery, scored.reranked
        return replace(
            self.template,
            epoch=epoch,
            retrieval=_rows(query, gallery, scored.plain),
            reranked=_rows(query, gallery, again) if again else (),
            image_quality=found.image_quality,
        )

    def _pass(self, loader: EvalLoader, quality: dict[str, QualityAccumulator], name: str) -> Side:
        """Run the networks over one side once; adds to ``quality``."""
        embeddings: dict[str, list[Tensor]] = {}
        found: dict[str, QualityAccumulator] = {}
        pids, camids, refused = [], [], dict[str, int]()
        with Progress(loader.num_images, f"Evaluate {name}") as bar:
            for batch in loader:
                views = self._views(batch, loader.samples, embeddings)
                raw = self.pixels.denormalize(batch.raw)
                for kind, images in views.kinds.items():
                    accumulator = found.setdefault(kind, QualityAccumulator())
                    accumulator.update(raw, self.pixels.denormalize(images))
                for state, count in views.num_refused.items():
                    refused[state] = refused.get(state, 0) + count
                pids.append(batch.pid)
                camids.append(batch.camid)
                bar.update(len(batch))
        share = Share(embeddings, pids, camids, refused, found)
        share = gathered(share)
        for kind, accumulator in share.quality.items():
            quality.setdefault(kind, QualityAccumulator()).add(accumulator)
        pid, camid = torch.cat(share.pids), torch.cat(share.camids)
        features = {
            state: Features(torch.cat(parts), pid, camid)
            for state, parts in share.embeddings.items()
        }
        return Side(features, share.refused)

    def _views(
        self, batch: Batch, samples: Sequence[Sample], embeddings: dict[str, list[Tensor]]
    ) -> Views:
        """Run the networks on one batch; adds its embeddings, by ``raw`` or key state."""
        subjects = [samples[index].subject for index in batch.index.tolist()]
        with self.autocast():
            views = self.views(batch, subjects)
            done: dict[int, Tensor] = {}  # two key states may be shown the very same images
            for state, images in {"raw": batch.raw, **views.protected}.items():
                if id(images) not in done:  # no classifier: nobody reads logits
                    done[id(images)] = self.views.reid.embed(images)
                embeddings.setdefault(state, []).append(done[id(images)])
        return views

    def _scores(self, query: Side, gallery: Side) -> Scores:
        """Score every direction under every key state; raw->raw involves no key."""
        raw = {"raw": gallery.features["raw"]}
        scores = score_directions(query.features, raw, cross_camera=self.cross_camera)
        for key in (state for state in query.features if state != "raw"):
            queries = {"raw": query.features["raw"], key: query.features[key]}
            galleries = {key: gallery.features[key]}
            scores |= score_directions(queries, galleries, cross_camera=self.cross_camera)
        return scores

    def _rescored(self, query: Side, gallery: Side, scores: Scores) -> Scores:
        """Score the same directions after k-reciprocal re-ranking."""
        return {
            (first, second): score_reranked(
                query.features[first], gallery.features[second], cross_camera=self.cross_camera
            )
            for first, second in scores
        }


def _rows(query: Side, gallery: Side, scores: Scores) -> tuple[RetrievalRow, ...]:
    """Give every score its row, by key state and direction."""
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
