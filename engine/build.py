"""From the configuration to a trainer or an evaluator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

from data.build import build_eval_loader, build_splits, build_train_loader
from data.checks import check_positives
from data.loaders import EvalLoader
from data.records import DatasetSplits, Sample
from engine.checkpoint import LoadedWeights, RunFolder, load_networks
from engine.evaluator import Evaluator
from engine.model import Model, build_model, load_pretrained, model_info, pretrained_model
from engine.pictures import picture_grid
from engine.report import EvalReport
from engine.supervision import Supervision, UpgradePolicy
from engine.train_step import BaselineStep, JointStep, TrainStep
from engine.trainer import Trainer, TrainPlan, ValidationRun
from engine.views import BaselineViews, JointViews, ViewMaker, images_by_kind
from modeling.build import build_objectives
from modeling.encryption.build import build_cipher
from modeling.encryption.cipher import Cipher
from modeling.objectives import Objectives
from modeling.privacy_networks import PrivacyNetworks
from solver.build import build_optimizers
from solver.optimizers import Optimizers
from utils.environment import environment_report
from utils.errors import UserError
from utils.metric_writer import MetricWriter

_LOGGER = logging.getLogger("reid_baseline")

_NUM_PICTURES = 6


def build_trainer(cfg: CfgNode) -> Trainer:
    """Build everything one training needs; with SOLVER.RESUME, as its last checkpoint left it.

    Raises:
        UserError: If the data, a checkpoint or a combination of values does not allow it.
    """
    splits = build_splits(cfg)
    policy = _policy(cfg)
    if policy.enabled and not splits.has_validation:
        raise UserError(
            f"MODEL.VAL_R1 is {policy.rank1} but data set '{splits.name}' has no validation split; "
            f"train on '{splits.name}_val' (data/train_split.py makes it), or leave MODEL.VAL_R1 "
            "out"
        )
    label_of = splits.label_of
    model = build_model(cfg, len(label_of))
    if cfg.MODEL.PRETRAIN_CHOICE == "self":
        load_networks(model.nets.official_networks, load_pretrained(cfg))
    objectives = build_objectives(cfg, len(label_of), model.nets.reid.feature_size)
    centers = nn.Identity() if objectives.centers is None else objectives.centers
    centers.to(model.device)
    optimizers = build_optimizers(cfg, model.nets, objectives.centers)
    folder = RunFolder(
        Path(cfg.OUTPUT_DIR), model.nets.official_networks, model_info(cfg, label_of)
    )
    epoch, saved = folder.load_latest() if cfg.SOLVER.RESUME else (0, None)
    if saved is None:
        folder.refuse_overwriting()
    supervision = Supervision(policy)
    step = _build_step(model, objectives, optimizers, supervision)
    loader = build_train_loader(cfg, splits, model.device)
    validation = _build_validation(cfg, model, splits)
    trainer = Trainer(
        step=step,
        networks=model.nets,
        centers=centers,
        loader=loader,
        optimizers=optimizers,
        supervision=supervision,
        plan=TrainPlan(
            cfg.SOLVER.MAX_EPOCHS,
            cfg.SOLVER.VAL_PERIOD,
            cfg.SOLVER.CHECKPOINT_PERIOD,
            cfg.SOLVER.LOG_PERIOD,
        ),
        folder=folder,
        # Last of all: it drops what an interrupted run wrote beyond the epoch resumed from; a run
        # of its own drops nothing.
        writer=MetricWriter(
            cfg.OUTPUT_DIR,
            resume_epoch=None if saved is None else epoch,
            resume_step=None if saved is None else saved["step"],
        ),
        validation=validation,
    )
    if saved is not None:
        trainer.restore(epoch, saved)
    return trainer


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
    splits = build_splits(cfg)
    weights = load_pretrained(cfg)
    model = pretrained_model(cfg, weights)
    best = weights.info.get("best", {})
    unqualified = best.get("can_qualify", False) and not best["qualified"]
    note = f"{weights.which}, {weights.source}"
    note += " (no validation qualified for upgradation)" * unqualified
    _LOGGER.info("Evaluating the weights of epoch %d: %s", weights.epoch, note)
    cipher = build_cipher(cfg) if isinstance(model.nets, PrivacyNetworks) else None
    notes = {"weights": note} | _other_desensitizer(cfg, weights)
    evaluator = build_evaluator(cfg, model, splits, cfg.EVAL.SPLIT, cipher, notes)
    draw = build_pictures(cfg, model, evaluator.query)
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
    with_key = cipher is None or cfg.TEST.RETRIEVE_WITH_KEY == "on"
    template = EvalReport(
        dataset=splits.name,
        split=split,
        mode=cfg.MODEL.MODE,
        epoch=0,
        headline_key=("right" if with_key else "ciphertext") if cipher else "none",
        retrieval=(),
        image_quality={},
        notes=splits.notes | notes | _protocol_notes(cfg, cipher),
        versions=environment_report(model.device),
    )
    return Evaluator(
        views=_build_views(cfg, model, cipher),
        networks=model.nets,
        query=build_eval_loader(cfg, query, model.device),
        gallery=build_eval_loader(cfg, gallery, model.device),
        query_samples=query,
        gallery_samples=gallery,
        pixels=model.pixels,
        autocast=model.autocast,
        template=template,
        cross_camera=cfg.TEST.CROSS_CAMERA,
        re_ranking=cfg.TEST.RE_RANKING == "on",
    )


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
        notes["protocol"] = "single camera: gallery images of the query's camera are not ignored"
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


def _build_step(
    model: Model, objectives: Objectives, optimizers: Optimizers, supervision: Supervision
) -> TrainStep:
    if isinstance(model.nets, PrivacyNetworks):
        return JointStep(model.nets, objectives, optimizers, supervision, model.autocast)
    return BaselineStep(model.nets, objectives, optimizers, model.autocast)


def _policy(cfg: CfgNode) -> UpgradePolicy:
    model = cfg.MODEL
    return UpgradePolicy(model.VAL_R1, model.VAL_R1_SLACK, model.PSNR, model.SSIM)


def _build_validation(cfg: CfgNode, model: Model, splits: DatasetSplits) -> ValidationRun | None:
    """Return what scores the validation split and draws pictures of it; None without a split."""
    if not splits.has_validation:
        return None
    # Nothing is encrypted here: keys change no decision, and each key state costs a pass.
    evaluator = build_evaluator(cfg, model, splits, "val", None, {})
    return ValidationRun(evaluator.evaluate, build_pictures(cfg, model, evaluator.query))


def build_pictures(cfg: CfgNode, model: Model, shown: EvalLoader) -> Callable[[], Image.Image]:
    """Return what draws a sheet of a few people of a loader in every kind of image.

    The people are chosen once, the model is taken as it is when the sheet is drawn.
    """
    samples = [shown.samples[index] for index in shown.source.usable.tolist()]
    first_of = {sample.pid: sample for sample in reversed(samples)}
    chosen = tuple(first_of[pid] for pid in sorted(first_of)[:_NUM_PICTURES])
    # A few images may be several batches: TEST.IMS_PER_BATCH decides.
    batches = tuple(build_eval_loader(cfg, chosen, model.device))
    cipher = build_cipher(cfg) if isinstance(model.nets, PrivacyNetworks) else None
    views = _build_views(cfg, model, cipher)

    @torch.inference_mode()
    def draw() -> Image.Image:
        was_training = model.nets.training
        model.nets.eval()
        with model.autocast():
            kinds = images_by_kind(views, batches, chosen)
        model.nets.train(was_training)
        return picture_grid(kinds, model.pixels)

    return draw
