"""Evaluation: one pass of the networks over a split, from which every score is computed.

``Evaluator`` scores a split; ``build_evaluation`` builds it for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from data.build import build_eval_loader, build_splits
from data.loaders import EvalLoader
from data.problems import check_positives
from data.records import DatasetSplits, Sample
from engine.checkpoint import LoadedWeights
from engine.distributed.processes import all_gather, first_on_machine, from_main, gather_rows, world
from engine.model import Model, load_pretrained, pretrained_model
from engine.report import DIRECTIONS, EvalReport, RetrievalRow
from engine.scoring.features import Features
from engine.scoring.image_quality import ImageQuality, QualityAccumulator
from engine.scoring.reranking import score_reranked
from engine.scoring.retrieval import RetrievalScores, score_directions
from engine.views import BaselineViews, JointViews, ViewMaker, image_grid, images_by_kind
from layers.pixels import PixelSpace
from modeling.build import build_cipher
from modeling.encryption.cipher import Cipher
from modeling.privacy_networks import PrivacyNetworks
from utils.device import precision_name, uncompiled
from utils.environment import environment_report
from utils.errors import UserError
from utils.logger import Progress, get_logger

_LOGGER = get_logger()
_GRID_IDENTITIES = 6

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
                query = self._pass(self.query, "query")
                gallery = self._pass(self.gallery, "gallery")
        finally:
            self.networks.train(was_training)
        qualities = (query.quality, gallery.quality)
        quality = {
            kind: QualityAccumulator([side[kind].rows() for side in qualities if kind in side])
            for kind in qualities[0] | qualities[1]
        }
        results = {kind: images.result() for kind, images in quality.items() if len(images)}
        return Extraction(query.side(), gallery.side(), results)

    def score(self, extraction: Extraction) -> Scored:
        """Return the scores of every direction under every key state."""
        query, gallery = extraction.query.features, extraction.gallery.features
        cross_camera = self.cross_camera
        plain = score_directions(query, {"raw": gallery["raw"]}, cross_camera=cross_camera)
        for key in (state for state in query if state != "raw"):
            queries = {"raw": query["raw"], key: query[key]}
            plain |= score_directions(queries, {key: gallery[key]}, cross_camera=cross_camera)
        if not self.re_ranking:
            return Scored(plain, None)
        return Scored(
            plain,
            {
                (first, second): score_reranked(
                    query[first], gallery[second], cross_camera=cross_camera
                )
                for first, second in plain
            },
        )

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
                subjects = [loader.samples[index].subject for index in batch.index.tolist()]
                with self.autocast():
                    views = self.views(batch, subjects)
                    embeddings: dict[int, Tensor] = {}  # two key states may have the same images
                    for state, images in {"raw": batch.raw, **views.protected}.items():
                        if id(images) not in embeddings:
                            embeddings[id(images)] = self.views.reid.embed(images)
                        share.embeddings.setdefault(state, []).append(embeddings[id(images)])
                raw = self.pixels.denormalize(batch.raw)
                for kind, images in views.kinds.items():
                    accumulator = share.quality.setdefault(kind, QualityAccumulator())
                    accumulator.update(raw, self.pixels.denormalize(images))
                _add_counts(share.refused, views.num_refused)
                share.pids.append(batch.pid)
                share.camids.append(batch.camid)
                bar.update(len(batch))
        return _gathered(share)


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

    def rows(parts: Sequence[Tensor], *size: int, dtype: torch.dtype = torch.int64) -> list[Tensor]:
        return [
            gather_rows(torch.cat(list(parts)) if parts else torch.zeros(0, *size, dtype=dtype))
        ]

    quality = {kind: own.quality.get(kind, QualityAccumulator()).rows() for kind in kinds}
    return _Share(
        {
            state: rows(own.embeddings.get(state, ()), size, dtype=dtype)
            for state, (size, dtype) in shapes.items()
        },
        rows(own.pids),
        rows(own.camids),
        refused,
        {kind: QualityAccumulator([gather_rows(part)]) for kind, part in quality.items()},
    )


def _add_counts(total: dict[str, int], counts: dict[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a checkpoint."""

    evaluator: Evaluator  # scores it
    epoch: int  # epoch of its weights; 0 if the checkpoint does not record it
    # returns an image grid of a few identities, with a column for every kind of image; None with
    # EVAL.IMAGES off
    draw: Callable[[], Image.Image] | None


def build_evaluation(cfg: CfgNode) -> Evaluation:
    """Build the evaluation of MODEL.PRETRAIN_DIR on EVAL.SPLIT.

    Raises:
        UserError: The data or the checkpoint cannot be used.
    """
    torch.backends.cudnn.benchmark = False  # scores must not depend on which kernels were fastest
    weights = from_main(lambda: load_pretrained(cfg))  # first, because a wrong folder is found fast
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
    draw = build_image_grid(cfg, model, evaluator.query_samples)
    return Evaluation(evaluator, weights.epoch, draw)


def _other_desensitizer(cfg: CfgNode, weights: LoadedWeights) -> dict[str, str]:
    """Return a note, and warn, if training used another desensitizer than this evaluation."""
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
    """Build the evaluation of a model on one split, ``test`` or ``val``.

    The weights of the model may change between evaluations. Without a cipher, nothing encrypted is
    scored. ``notes`` are added to those of the report.
    """
    query, gallery = _sides(splits, split)
    title = "validation" if split == "val" else "test"
    here = world()
    sides = [build_eval_loader(cfg, samples, model.device, here) for samples in (query, gallery)]
    usable = [_usable(side) for side in sides]
    check_positives(*usable, cross_camera=cfg.TEST.CROSS_CAMERA, title=title)
    versions = environment_report(model.device) | {"precision": precision_name(model.precision)}
    if here.size > 1:
        versions["processes"] = str(here.size)
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
        versions=versions,
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


def _usable(loader: EvalLoader) -> tuple[Sample, ...]:
    """Return the samples of a side, of all processes, whose images can be decoded."""
    own = [loader.samples[index] for index in loader.source.usable.tolist()]
    return tuple(sample for part in all_gather(own) for sample in part)


def _left_out(usable: Sequence[Sequence[Sample]], *sides: Sequence[Sample]) -> dict[str, str]:
    """Return a note with the number of images that are not scored; empty if all are scored."""
    missing = [len(side) - len(part) for part, side in zip(usable, sides, strict=True)]
    if not any(missing):
        return {}
    queries, gallery = (f"{n} of {len(side)}" for n, side in zip(missing, sides, strict=True))
    return {"left out": f"{queries} queries and {gallery} gallery images, which cannot be decoded"}


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


def build_image_grid(
    cfg: CfgNode, model: Model, samples: Sequence[Sample]
) -> Callable[[], Image.Image] | None:
    """Return a function that draws a few identities in every kind of image.

    The identities are chosen once; the function uses the model's weights at the time of the call.
    None with EVAL.IMAGES off.
    """
    if cfg.EVAL.IMAGES == "off":
        return None
    first_of = {sample.pid: sample for sample in reversed(samples)}
    chosen = tuple(first_of[pid] for pid in sorted(first_of)[:_GRID_IDENTITIES])
    batches = tuple(build_eval_loader(cfg, chosen, model.device))  # several if batches are small
    cipher = build_cipher(cfg) if isinstance(model.nets, PrivacyNetworks) else None
    views = _build_views(cfg, model, cipher)

    @torch.inference_mode()
    def draw() -> Image.Image:
        was_training = model.nets.training
        model.nets.eval()
        with uncompiled(), model.autocast():
            kinds = images_by_kind(views, batches, chosen)
        model.nets.train(was_training)
        return image_grid(kinds, model.pixels)

    return draw
