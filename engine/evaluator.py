"""Score a model: one pass over the images feeds every direction, key state and image quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from data.loaders import EvalLoader
from data.records import Batch, Sample
from engine.image_quality import QualityAccumulator
from engine.report import DIRECTIONS, EvalReport, RetrievalRow
from engine.reranking import score_reranked
from engine.retrieval import Features, RetrievalScores, score_directions
from layers.pixels import PixelSpace
from modeling.encryption.cipher import Cipher, read_sealed
from modeling.privacy_networks import PrivacyNetworks, ReIDOnly
from utils.progress import Progress

# By what query and gallery are: ``raw``, or the key state of a protected image.
Scores = dict[tuple[str, str], RetrievalScores]


@dataclass(frozen=True)
class Views:
    """The images that one batch of B raw images turns into, all normalised (B, 3, H, W).

    Attributes:
        kinds: Images whose quality is measured against raw, by name.
        protected: What the re-ID network is given as the protected image, by key state.
        num_refused: How many images each key state's holder could not open.
    """

    kinds: dict[str, Tensor]
    protected: dict[str, Tensor]
    num_refused: dict[str, int] = field(default_factory=dict)


class ViewMaker(Protocol):
    """Turns a batch into its views; the joint model and the baseline differ only here."""

    @property
    def reid(self) -> nn.Module:
        """The re-ID network that is scored."""
        ...

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Return the views of a batch whose images belong to these subject labels."""
        ...


class BaselineViews:
    """Mode C: the protected image is the desensitized one, and nothing is encrypted."""

    def __init__(self, nets: ReIDOnly) -> None:
        self.reid = nets.reid

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:  # noqa: ARG002
        """Return the desensitized images as the only view."""
        return Views({"desensitized": batch.desensitized}, {"none": batch.desensitized})


class JointViews:
    """Mode GCR: anonymized, encrypted, decrypted and recovered images.

    Args:
        nets: The joint model, in evaluation mode.
        cipher: Encrypts anonymized images; None leaves out everything that needs it.
        recover_with_key: TEST.RECOVERY_WITH_KEY: whether recovery is given the decrypted or the
            encrypted image.
    """

    def __init__(
        self, nets: PrivacyNetworks, cipher: Cipher | None = None, *, recover_with_key: bool = True
    ) -> None:
        self.reid = nets.reid
        self._nets = nets
        self._cipher = cipher
        self._recover_with_key = recover_with_key

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Anonymize a batch, encrypt it, and read it back with each key."""
        anonymized = self._nets.anonymizer(batch.raw).float()
        kinds = {"desensitized": batch.desensitized, "anonymized": anonymized}
        protected, refused = {"none": anonymized}, {}
        to_recover = anonymized
        if self._cipher is not None:
            sealed = self._cipher.seal(anonymized, subjects)
            for state in ("right", "wrong", "ciphertext"):
                reading = read_sealed(self._cipher, sealed, state)
                protected[state], refused[state] = reading.images, reading.num_refused
            kinds |= {"encrypted": protected["ciphertext"], "decrypted": protected["right"]}
            to_recover = protected["right" if self._recover_with_key else "ciphertext"]
        kinds["recovered"] = self._nets.recovery(to_recover).float()
        return Views(kinds, protected, refused)


@dataclass(frozen=True)
class _Side:
    """Query or gallery after the pass: features by ``raw`` or key state."""

    features: dict[str, Features]
    refused: dict[str, int]


@dataclass(frozen=True)
class Evaluator:
    """Scores one split of one data set.

    Attributes:
        views: Makes the images of a batch.
        networks: Every network in use; put into evaluation mode.
        query, gallery: Images of the split, in order.
        query_samples, gallery_samples: What the loaders were made from, for subject labels.
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
    gallery_samples: Sequence[Sample]
    pixels: PixelSpace
    autocast: Callable[[], AbstractContextManager[object]]
    template: EvalReport
    cross_camera: bool = True
    re_ranking: bool = False

    @torch.inference_mode()
    def evaluate(self, epoch: int) -> EvalReport:
        """Return the report of the current weights, which are those of ``epoch``."""
        was_training = self.networks.training
        self.networks.eval()
        quality: dict[str, QualityAccumulator] = {}
        try:
            query = self._pass(self.query, self.query_samples, quality, "query")
            gallery = self._pass(self.gallery, self.gallery_samples, quality, "gallery")
        finally:
            self.networks.train(was_training)
        scores = self._scores(query, gallery)
        again = self._rescored(query, gallery, scores) if self.re_ranking else None
        return replace(
            self.template,
            epoch=epoch,
            retrieval=_rows(query, gallery, scores),
            reranked=_rows(query, gallery, again) if again else (),
            image_quality={kind: one.result() for kind, one in quality.items()},
        )

    def _pass(
        self,
        loader: EvalLoader,
        samples: Sequence[Sample],
        quality: dict[str, QualityAccumulator],
        name: str,
    ) -> _Side:
        """Run the networks over one side once; adds to ``quality``."""
        embeddings: dict[str, list[Tensor]] = {}
        pids, camids, refused = [], [], dict[str, int]()
        with Progress(loader.num_images, f"Evaluate {name}") as bar:
            for batch in loader:
                views = self._views(batch, samples, embeddings)
                raw = self.pixels.denormalize(batch.raw)
                for kind, images in views.kinds.items():
                    accumulator = quality.setdefault(kind, QualityAccumulator())
                    accumulator.update(raw, self.pixels.denormalize(images))
                for state, count in views.num_refused.items():
                    refused[state] = refused.get(state, 0) + count
                pids.append(batch.pid)
                camids.append(batch.camid)
                bar.update(len(batch))
        pid, camid = torch.cat(pids), torch.cat(camids)
        features = {
            state: Features(torch.cat(parts), pid, camid) for state, parts in embeddings.items()
        }
        return _Side(features, refused)

    def _views(
        self, batch: Batch, samples: Sequence[Sample], embeddings: dict[str, list[Tensor]]
    ) -> Views:
        """Run the networks on one batch; adds its embeddings, by ``raw`` or key state."""
        subjects = [samples[index].subject for index in batch.index.tolist()]
        with self.autocast():
            views = self.views(batch, subjects)
            for state, images in {"raw": batch.raw, **views.protected}.items():
                embedding = self.views.reid(images).embedding
                embeddings.setdefault(state, []).append(embedding.float())
        return views

    def _scores(self, query: _Side, gallery: _Side) -> Scores:
        """Score every direction under every key state; raw->raw involves no key."""
        raw = {"raw": gallery.features["raw"]}
        scores = score_directions(query.features, raw, cross_camera=self.cross_camera)
        for key in (state for state in query.features if state != "raw"):
            queries = {"raw": query.features["raw"], key: query.features[key]}
            galleries = {key: gallery.features[key]}
            scores |= score_directions(queries, galleries, cross_camera=self.cross_camera)
        return scores

    def _rescored(self, query: _Side, gallery: _Side, scores: Scores) -> Scores:
        """Score the same directions after k-reciprocal re-ranking."""
        return {
            (first, second): score_reranked(
                query.features[first], gallery.features[second], cross_camera=self.cross_camera
            )
            for first, second in scores
        }


def _rows(query: _Side, gallery: _Side, scores: Scores) -> tuple[RetrievalRow, ...]:
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
