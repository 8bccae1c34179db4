"""From the configuration to a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from yacs.config import CfgNode

from data.build import build_splits, build_train_loader
from data.records import DatasetSplits
from engine.checkpoint import load_networks
from engine.distributed.parallel import over_processes, parallel_phases, shared_step
from engine.distributed.processes import first_on_machine, from_main, is_main, world
from engine.evaluation import build_evaluator, build_pictures
from engine.model import Model, build_model, compile_model, load_pretrained, model_info
from engine.run_folder import RunFolder, TrainPlan
from engine.supervision import Supervision, UpgradePolicy
from engine.train_step import BaselineStep, JointStep, SearchingStep, TrainStep, phases_of
from engine.trainer import Trainer, ValidationRun
from modeling.build import build_objectives
from modeling.objectives import Objectives
from modeling.privacy_networks import PrivacyNetworks
from solver.build import build_optimizers
from solver.optimizers import Optimizers
from utils.config_tree import changed
from utils.errors import UserError
from utils.metric_writer import MetricWriter, SilentWriter


def build_trainer(cfg: CfgNode) -> Trainer:
    """Build everything one training needs; with SOLVER.RESUME, as its last checkpoint left it.

    Raises:
        UserError: If the data, a checkpoint or a combination of values does not allow it.
    """
    splits = first_on_machine(lambda: build_splits(cfg))
    policy = _policy(cfg)
    if policy.enabled and not splits.has_validation:
        raise UserError(
            f"MODEL.VAL_R1 is {policy.rank1} but data set '{splits.name}' has no validation split; "
            f"train on '{splits.name}_val' (data/train_split.py makes it), or leave MODEL.VAL_R1 "
            "out"
        )
    label_of = splits.label_of
    # One process of a machine may have to fetch the start weights for all.
    model = first_on_machine(lambda: build_model(_start(cfg), len(label_of)))
    if cfg.MODEL.PRETRAIN_CHOICE == "self" and not cfg.SOLVER.RESUME:
        load_networks(model.nets.official_networks, from_main(lambda: load_pretrained(cfg)))
    objectives = build_objectives(cfg, len(label_of), model.nets.reid.feature_size)
    centers = nn.Identity() if objectives.centers is None else objectives.centers
    centers.to(model.device)
    optimizers = build_optimizers(cfg, model.nets, objectives.centers)
    folder = RunFolder(
        Path(cfg.OUTPUT_DIR),
        model.nets.official_networks,
        model_info(cfg, label_of),
        writes=is_main(),
    )
    epoch, saved = folder.load_latest() if cfg.SOLVER.RESUME else (0, None)
    if saved is None and is_main():
        folder.refuse_overwriting()
    supervision = Supervision(policy)
    step = build_step(
        model, objectives, optimizers, supervision, search_kernels=cfg.RUNTIME.CUDNN_BENCHMARK
    )
    here = world()
    loader = build_train_loader(
        cfg, splits, model.device, rank=here.rank, world_size=here.size, sharers=here.local_size
    )
    compile_model(cfg, model, cfg.SOLVER.MAX_EPOCHS * loader.num_images)
    validation = _build_validation(cfg, model, splits)
    if saved is not None:  # before the writer: a resume that is refused must drop no numbers
        optimizers.load_state_dict(saved["optimizers"])
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
        writer=_build_writer(cfg, epoch, saved),
        validation=validation,
    )
    if saved is not None:
        trainer.restore(epoch, saved)
    return trainer


def _start(cfg: CfgNode) -> CfgNode:
    """Return the configuration to build networks from: a resume needs nobody's start weights."""
    if not cfg.SOLVER.RESUME:
        return cfg
    return changed(cfg, {"MODEL.PRETRAIN_CHOICE": "self"})  # the checkpoint replaces start values


def build_step(
    model: Model,
    objectives: Objectives,
    optimizers: Optimizers,
    supervision: Supervision,
    *,
    search_kernels: bool = False,
) -> TrainStep:
    """Return the step of the joint model, or of the baseline; of several processes, shared."""
    nets, objectives = model.nets, over_processes(objectives)
    phases = parallel_phases(nets, phases_of(nets, objectives))
    how = (model.autocast, phases, model.memory_format)
    step: TrainStep = (
        JointStep(nets, objectives, optimizers, supervision, *how)
        if isinstance(nets, PrivacyNetworks)
        else BaselineStep(nets, objectives, optimizers, *how)
    )
    return shared_step(SearchingStep(step) if search_kernels else step)


def _build_writer(
    cfg: CfgNode, epoch: int, saved: dict[str, Any] | None
) -> MetricWriter | SilentWriter:
    if not is_main():
        return SilentWriter()
    return MetricWriter(
        cfg.OUTPUT_DIR,
        resume_epoch=None if saved is None else epoch,
        resume_step=None if saved is None else saved["step"],
    )


def _policy(cfg: CfgNode) -> UpgradePolicy:
    model = cfg.MODEL
    return UpgradePolicy(model.VAL_R1, model.VAL_R1_SLACK, model.PSNR, model.SSIM)


def _build_validation(cfg: CfgNode, model: Model, splits: DatasetSplits) -> ValidationRun | None:
    """Return what scores the validation split and draws pictures of it; None without a split."""
    if not splits.has_validation:
        return None
    # Nothing is encrypted here: keys change no decision, and each key state costs a pass.
    evaluator = build_evaluator(cfg, model, splits, "val", None, {})
    return ValidationRun(evaluator.evaluate, build_pictures(cfg, model, evaluator.query_samples))
