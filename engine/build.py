"""From the configuration to a trainer."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from yacs.config import CfgNode

from data.build import build_splits, build_train_loader
from data.records import DatasetSplits
from engine.checkpoint import load_networks
from engine.evaluation import build_evaluator, build_pictures
from engine.model import Model, build_model, compile_model, load_pretrained, model_info
from engine.run_folder import RunFolder
from engine.supervision import Supervision, UpgradePolicy
from engine.train_step import BaselineStep, JointStep, TrainStep
from engine.trainer import Trainer, TrainPlan, ValidationRun
from modeling.build import build_objectives
from modeling.objectives import Objectives
from modeling.privacy_networks import PrivacyNetworks
from solver.build import build_optimizers
from solver.optimizers import Optimizers
from utils.errors import UserError
from utils.metric_writer import MetricWriter


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
    model = build_model(_start(cfg), len(label_of))
    compile_model(cfg, model)
    if cfg.MODEL.PRETRAIN_CHOICE == "self" and not cfg.SOLVER.RESUME:
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
    step = build_step(model, objectives, optimizers, supervision)
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


def _start(cfg: CfgNode) -> CfgNode:
    """Return the configuration to build networks from: a resume needs nobody's start weights."""
    if not cfg.SOLVER.RESUME:
        return cfg
    resumed = cfg.clone()
    resumed.defrost()
    resumed.MODEL.PRETRAIN_CHOICE = "self"  # start values, which the checkpoint replaces
    resumed.freeze()
    return resumed


def build_step(
    model: Model, objectives: Objectives, optimizers: Optimizers, supervision: Supervision
) -> TrainStep:
    """Return the step of the joint model, or of the baseline."""
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
