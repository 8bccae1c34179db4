"""Score a model: one pass over the images feeds every direction, key state and image quality.

From the configuration to the evaluation of a model or a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from data.build import build_eval_loader, build_splits
from data.loaders import EvalLoader
from data.positives import check_positives
from data.records import Batch, DatasetSplits, Sample
from engine.checkpoint import LoadedWeights
from engine.distributed.processes import (
    Share,
    all_gather,
    first_on_machine,
    from_main,
    gathered,
    world,
)
from engine.model import Model, load_pretrained, pretrained_model
from engine.results import DIRECTIONS, EvalReport, RetrievalRow
from engine.scoring.image_quality import ImageQuality, QualityAccumulator
from engine.scoring.reranking import score_reranked
from engine.scoring.retrieval import Features, RetrievalScores, score_directions
from engine.views import BaselineViews, JointViews, ViewMaker, Views, images_by_kind, picture_grid
from layers.pixels import PixelSpace
from modeling.build import build_cipher
from modeling.encryption.cipher import Cipher
from modeling.privacy_networks import PrivacyNetworks
from utils.compiling import uncompiled
from utils.device import precision_name
from utils.environment import environment_report
from utils.errors import UserError
from utils.logger import get_logger
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


_LOGGER = get_logger()

_NUM_PICTURES = 6


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a checkpoint.

    Attributes:
        evaluator: Scores it.
        epoch: Epoch of its weights; 0 where the checkpoint does not say.
        draw: Draws a sheet of a few people of the split in every kind of image.
    """

    evaluator: Evaluator
    epoch: int
    draw: Callable[[], Image.Image]


def build_evaluation(cfg: CfgNode) -> Evaluation:
    """Build the evaluation of MODEL.PRETRAIN_DIR on EVAL.SPLIT.

    Raises:
        UserError: If the data or the checkpoint does not allow it.
    """
    weights = from_main(lambda: load_pretrained(cfg))  # before the data: a wrong folder ends it now
    splits = first_on_machine(lambda: build_splits(cfg))
    model = pretrained_model(cfg, weights)
    best = weights.info.get("best", {})
    unqualified = best.get("can_qualify", False) and not best["qualified"]
    note = f"{weights.which}, {weights.source}"
    note += " (no validation qualified for upgradation)" * unqualified
    _LOGGER.info("Evaluating the weights of epoch %d: %s", weights.epoch, note)
    cipher = build_cipher(cfg) if isinstance(model.nets, PrivacyNetworks) else None
    notes = {"weights": note} | _other_desensitizer(cfg, weights)
    evaluator = build_evaluator(cfg, model, splits, cfg.EVAL.SPLIT, cipher, notes)
    draw = build_pictures(cfg, model, evaluator.query_samples)
    return Evaluation(evaluator, weights.epoch, draw)


def _other_desensitizer(cfg: CfgNode, weights: LoadedWeights) -> dict[str, str]:
    """Warn and note where training used another desensitizer than this evaluation."""
    trained = weights.info.get("desensitizer")
    if trained in (None, {"type": cfg.INPUT.TYPE, "radius": cfg.INPUT.RADIUS}):
        return {}
    text = f"{trained['type']} {trained['radius']:g}"
    _LOGGER.warning(
        "The checkpoint was trained with INPUT.TYPE %s and RADIUS %g, and is scored with %s %g",
        trained["type"], trained["radius"], cfg.INPUT.TYPE, cfg.INPUT.RADIUS,
    )  # fmt: skip
    return {"trained with": text}


def build_evaluator(
    cfg: CfgNode,
    model: Model,
    splits: DatasetSplits,
    split: str,
    cipher: Cipher | None,
    notes: dict[str, str],
) -> Evaluator:
    """Build the evaluation of a model on one split.

    Args:
        cfg: The configuration.
        model: The model; its weights may change between evaluations.
        splits: The data set.
        split: ``test`` or ``val``.
        cipher: Encrypts anonymized images; None scores nothing encrypted.
        notes: Facts the report has to carry.
    """
    query, gallery = _sides(splits, split)
    title = "validation" if split == "val" else "test"
    check_positives(query, gallery, cross_camera=cfg.TEST.CROSS_CAMERA, title=title)
    sides = [_loader(cfg, samples, model) for samples in (query, gallery)]
    usable = [_usable(side) for side in sides]
    with_key = cipher is None or cfg.TEST.RETRIEVE_WITH_KEY == "on"
    template = EvalReport(
        dataset=splits.name,
        split=split,
        mode=cfg.MODEL.MODE,
        epoch=0,
        headline_key=("right" if with_key else "ciphertext") if cipher else "none",
        retrieval=(),
        image_quality={},
        notes=splits.notes
        | notes
        | _protocol_notes(cfg, cipher)
        | _left_out(usable, query, gallery),
        caution=cipher.caution if cipher else "",
        versions=environment_report(model.device)
        | {"precision": precision_name(model.precision)}
        | _processes(),
    )
    return Evaluator(
        views=_build_views(cfg, model, cipher),
        networks=model.nets,
        query=sides[0],
        gallery=sides[1],
        query_samples=usable[0],
        pixels=model.pixels,
        autocast=model.autocast,
        template=template,
        cross_camera=cfg.TEST.CROSS_CAMERA,
        re_ranking=cfg.TEST.RE_RANKING == "on",
    )


def _loader(cfg: CfgNode, samples: Sequence[Sample], model: Model) -> EvalLoader:
    """Return the loader of this process's share of a side."""
    here = world()
    return build_eval_loader(
        cfg,
        samples,
        model.device,
        rank=here.rank,
        world_size=here.size,
        sharers=here.local_size,
    )


def _usable(loader: EvalLoader) -> tuple[Sample, ...]:
    """Return the samples of a side, of all processes, whose pictures are sound."""
    own = [loader.samples[place] for place in loader.source.usable.tolist()]
    return tuple(sample for part in all_gather(own) for sample in part)


def _left_out(usable: Sequence[Sequence[Sample]], *sides: Sequence[Sample]) -> dict[str, str]:
    """Note what a score on a part of the pictures must not hide."""
    missing = [len(whole) - len(sound) for sound, whole in zip(usable, sides, strict=True)]
    if not any(missing):
        return {}
    text = "{} of {} queries and {} of {} gallery images, which cannot be decoded"
    return {"left out": text.format(missing[0], len(sides[0]), missing[1], len(sides[1]))}


def _processes() -> dict[str, str]:
    return {"processes": str(world().size)} if world().size > 1 else {}


def _sides(splits: DatasetSplits, split: str) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    if split == "val":
        sides, remedy = (splits.val_query, splits.val_gallery), "EVAL.SPLIT test"
    else:
        sides, remedy = (splits.query, splits.gallery), "EVAL.SPLIT val"
    for name, side in zip(("query", "gallery"), sides, strict=True):
        if not side:
            raise UserError(
                f"data set '{splits.name}' has no {name} images in its {split} split; take another "
                f"data set or {remedy}"
            )
    return sides


def _protocol_notes(cfg: CfgNode, cipher: Cipher | None) -> dict[str, str]:
    notes = {"desensitized by": f"{cfg.INPUT.TYPE} {cfg.INPUT.RADIUS:g}"}
    if not cfg.TEST.CROSS_CAMERA:
        notes["matches"] = (
            "of the query's own camera too, as for a single camera (TEST.CROSS_CAMERA False)"
        )
    if cipher is not None:
        notes["encryption"] = cipher.name + ("" if cipher.secure else " (not secure)")
        if cfg.TEST.RECOVERY_WITH_KEY == "off":
            notes["recovered from"] = "encrypted images"
    return notes


def _build_views(cfg: CfgNode, model: Model, cipher: Cipher | None) -> ViewMaker:
    if isinstance(model.nets, PrivacyNetworks):
        with_key = cfg.TEST.RECOVERY_WITH_KEY == "on"
        return JointViews(model.nets, cipher, recover_with_key=with_key)
    return BaselineViews(model.nets)


def build_pictures(
    cfg: CfgNode, model: Model, shown: Sequence[Sample]
) -> Callable[[], Image.Image]:
    """Return what draws a sheet of a few people in every kind of image.

    The people are chosen once, the model is taken as it is when the sheet is drawn.
    """
    first_of = {sample.pid: sample for sample in reversed(shown)}
    chosen = tuple(first_of[pid] for pid in sorted(first_of)[:_NUM_PICTURES])
    # A few images may be several batches: TEST.IMS_PER_BATCH decides.
    batches = tuple(build_eval_loader(cfg, chosen, model.device))
    cipher = build_cipher(cfg) if isinstance(model.nets, PrivacyNetworks) else None
    views = _build_views(cfg, model, cipher)

    @torch.inference_mode()
    def draw() -> Image.Image:
        was_training = model.nets.training
        model.nets.eval()
        with uncompiled(), model.autocast():
            kinds = images_by_kind(views, batches, chosen)
        model.nets.train(was_training)
        return picture_grid(kinds, model.pixels)

    return draw
