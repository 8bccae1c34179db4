"""From the configuration to the evaluation of a model or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from yacs.config import CfgNode

from data.build import build_eval_loader, build_splits
from data.loaders import EvalLoader
from data.problems import check_positives
from data.records import DatasetSplits, Sample
from engine.checkpoint import LoadedWeights
from engine.distributed.processes import all_gather, first_on_machine, from_main, world
from engine.evaluator import Evaluator
from engine.model import Model, load_pretrained, pretrained_model
from engine.report import EvalReport
from engine.views import BaselineViews, JointViews, ViewMaker, image_grid, images_by_kind
from modeling.build import build_cipher
from modeling.encryption.cipher import Cipher
from modeling.privacy_networks import PrivacyNetworks
from utils.device import precision_name, uncompiled
from utils.environment import environment_report
from utils.errors import UserError
from utils.logger import get_logger

_LOGGER = get_logger()
_GRID_IDENTITIES = 6


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
    """Build the evaluation of a model on one split.

    Args:
        cfg: The configuration.
        model: The model; its weights may change between evaluations.
        splits: The data set.
        split: ``test`` or ``val``.
        cipher: Encrypts anonymized images; None scores nothing encrypted.
        notes: Further notes of the report.
    """
    query, gallery = _sides(splits, split)
    title = "validation" if split == "val" else "test"
    check_positives(query, gallery, cross_camera=cfg.TEST.CROSS_CAMERA, title=title)
    sides = [build_eval_loader(cfg, samples, model.device, world()) for samples in (query, gallery)]
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


def _usable(loader: EvalLoader) -> tuple[Sample, ...]:
    """Return the samples of a side, of all processes, whose images can be decoded."""
    own = [loader.samples[index] for index in loader.source.usable.tolist()]
    return tuple(sample for part in all_gather(own) for sample in part)


def _left_out(usable: Sequence[Sequence[Sample]], *sides: Sequence[Sample]) -> dict[str, str]:
    """Return a note with the number of images that are not scored; empty if all are scored."""
    missing = [len(side) - len(part) for part, side in zip(usable, sides, strict=True)]
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
