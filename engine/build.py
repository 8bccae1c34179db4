"""From the configuration to a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from data.build import build_splits, build_train_loader, check_before_training
from data.datasets.layout import LoadRequest
from data.records import DatasetSplits
from data.registry import split_command
from engine.checkpoint import (
    NATIVE_NAMES,
    CheckpointError,
    LoadedWeights,
    RunFolder,
    load_networks,
    training_in,
)
from engine.distributed.parallel import over_processes, parallel_phases, shared_step
from engine.distributed.processes import first_on_machine, from_main, is_main, world
from engine.evaluation import build_evaluator, build_image_grid
from engine.model import (
    SHAPE_KEYS,
    Model,
    build_model,
    compile_model,
    load_pretrained,
    model_info,
    pids_by_label,
)
from engine.supervision import Supervision, UpgradePolicy
from engine.train_step import BaselineStep, JointStep, TrainStep, phases_of
from engine.trainer import Trainer, TrainPlan, ValidationRun
from modeling.build import build_objectives
from modeling.objectives import Objectives
from modeling.privacy_networks import OUTPUT_MODES, PrivacyNetworks
from modeling.weights import CLASSIFIER_KEY, num_classes_of
from solver.optimizers import Optimizers, build_optimizers
from utils.config_tree import changed, values_by_name
from utils.errors import UserError, naming_keys
from utils.logger import get_logger
from utils.metric_writer import MetricWriter, SilentWriter, Trackers, check_packages

_LOGGER = get_logger()


def build_trainer(cfg: CfgNode) -> Trainer:
    """Build a training; with SOLVER.RESUME, in the state of its last checkpoint.

    Raises:
        UserError: The data, a checkpoint or a combination of values does not allow it.
    """
    from_main(lambda: check_packages(cfg.RUNTIME.TRACKERS))
    splits = first_on_machine(lambda: build_splits(cfg))
    policy = UpgradePolicy.of(
        cfg.MODEL.VAL_R1, cfg.MODEL.VAL_R1_SLACK, cfg.MODEL.PSNR, cfg.MODEL.SSIM
    )
    upgrades = policy.enabled and cfg.MODEL.MODE == "GCR"
    if upgrades and splits.train and not splits.has_validation:
        request = LoadRequest(
            splits.name, Path(cfg.DATASETS.ROOT_DIR), cfg.MSMT17.PROTOCOL, cfg.CUHK03.KIND
        )
        raise UserError(
            f"MODEL.VAL_R1 is {cfg.MODEL.VAL_R1} but data set '{splits.name}' has no validation "
            f"split; {split_command(request)}, or leave MODEL.VAL_R1 out"
        )
    here = world()
    check_before_training(cfg, splits, here)
    label_of = splits.label_of
    # A resume does not need start weights.
    start = changed(cfg, {"MODEL.PRETRAIN_CHOICE": "self"}) if cfg.SOLVER.RESUME else cfg
    # One process of each machine downloads the start weights, if necessary.
    model = first_on_machine(lambda: build_model(start, len(label_of)))
    if cfg.MODEL.PRETRAIN_CHOICE == "self" and not cfg.SOLVER.RESUME:
        weights = from_main(lambda: load_pretrained(cfg, as_start=True))
        _load_start_weights(model, weights, label_of)
    objectives = build_objectives(cfg, len(label_of), model.nets.reid.feature_size)
    centers = nn.Identity() if objectives.centers is None else objectives.centers
    centers.to(model.device)
    optimizers = build_optimizers(cfg, model.nets.official_networks, objectives.centers)
    # cuDNN tries its kernels once for each shape and keeps the fastest. Runs may then differ in
    # rounding, so an evaluation turns this off (engine.evaluation).
    torch.backends.cudnn.benchmark = cfg.RUNTIME.CUDNN_BENCHMARK
    folder = RunFolder(
        Path(cfg.OUTPUT_DIR),
        model.nets.official_networks,
        model_info(cfg, label_of),
        writes=is_main(),
    )
    from_main(lambda: _check_folder(cfg))
    epoch, saved = folder.load_latest() if cfg.SOLVER.RESUME else (0, None)
    supervision = Supervision(policy, cfg.MODEL.TEACHER_EMA)
    step = build_step(model, objectives, optimizers, supervision)
    loader = build_train_loader(cfg, splits, model.device, here)
    compile_model(cfg, model, cfg.SOLVER.MAX_EPOCHS * loader.num_images)
    validation = _build_validation(cfg, model, splits)
    if saved is not None:  # before the writer, so that a refused resume deletes no numbers
        optimizers.load_state_dict(saved["optimizers"])
    # Validations are compared in a direction of images that are trained on. The published one,
    # raw->protected, needs a network that is trained on both.
    on_raw, on_protected = OUTPUT_MODES[cfg.MODEL.OUTPUT_MODE]
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
            ("raw" if on_raw else "protected", "protected" if on_protected else "raw")
            if on_raw or on_protected
            else None,
        ),
        folder=folder,
        # Last, because on a resume it deletes the numbers of later epochs.
        writer=_build_writer(cfg, epoch, saved),
        validation=validation,
        saves_images=cfg.EVAL.IMAGES == "on",
    )
    if saved is not None:
        trainer.restore(epoch, saved)
    return trainer


def _load_start_weights(model: Model, weights: LoadedWeights, label_of: Mapping[int, int]) -> None:
    """Load a checkpoint as start weights, without the classifier if the identities differ.

    The centres are not part of a checkpoint's weights and always start from new values.
    """
    recorded = weights.info.get("pid_of_label")
    num_recorded = num_classes_of(weights.networks["C"], weights.source)
    is_same = num_recorded == len(label_of) and recorded in (None, pids_by_label(label_of))
    if not is_same:
        _LOGGER.warning(
            "Fine-tuning: %s was trained on %d identities, and this data set has %d%s for training;"
            " the classifier and the centres start from new values, all other weights are loaded",
            weights.source, num_recorded, len(label_of),
            " others" if num_recorded == len(label_of) else "",
        )  # fmt: skip
    leave_out = () if is_same else (CLASSIFIER_KEY,)
    if new := sorted(set(model.nets.official_networks) - set(weights.networks)):
        _LOGGER.info(
            "Networks that start from random weights, because %s does not contain them: %s",
            weights.source, ", ".join(new),
        )  # fmt: skip
    with naming_keys(*SHAPE_KEYS):
        load_networks(model.nets.official_networks, weights, leave_out=leave_out)


def _check_folder(cfg: CfgNode) -> None:
    """Raise if there is no training to resume, or if a new one would overwrite another."""
    folder = Path(cfg.OUTPUT_DIR)
    latest, existing = folder / NATIVE_NAMES["latest"], training_in(folder)
    if cfg.SOLVER.RESUME and not latest.is_file():
        raise CheckpointError(
            f"SOLVER.RESUME is True, but {latest} does not exist; expected the OUTPUT_DIR of an "
            "interrupted training (leave SOLVER.RESUME out to start one)"
        )
    if not cfg.SOLVER.RESUME and existing is not None:
        raise CheckpointError(
            f"{existing} exists: OUTPUT_DIR contains a training; continue it with SOLVER.RESUME "
            "True, or choose another OUTPUT_DIR"
        )


def build_step(
    model: Model, objectives: Objectives, optimizers: Optimizers, supervision: Supervision
) -> TrainStep:
    """Return the step of the joint model or of the baseline, over all processes of the run."""
    nets, objectives = model.nets, over_processes(objectives)
    phases = parallel_phases(nets, phases_of(nets, objectives))
    settings = (objectives, optimizers, model.autocast, phases, model.memory_format)
    if isinstance(nets, PrivacyNetworks):
        return shared_step(JointStep(*settings, nets=nets, supervision=supervision))
    return shared_step(BaselineStep(*settings))


def _build_writer(
    cfg: CfgNode, epoch: int, saved: dict[str, Any] | None
) -> MetricWriter | SilentWriter:
    if not is_main():
        return SilentWriter()
    folder, names, resumes = Path(cfg.OUTPUT_DIR), cfg.RUNTIME.TRACKERS, saved is not None
    return MetricWriter(
        folder,
        resume_epoch=None if saved is None else epoch,
        resume_step=None if saved is None else saved["step"],
        tensorboard="tensorboard" in names,
        trackers=Trackers(names, folder, values_by_name(cfg), resumes=resumes),
    )


def _build_validation(cfg: CfgNode, model: Model, splits: DatasetSplits) -> ValidationRun | None:
    """Return how the validation split is scored and drawn; None without such a split."""
    if not splits.has_validation:
        return None
    # Without a cipher: keys do not change a decision, and each key state would cost a pass.
    evaluator = build_evaluator(cfg, model, splits, "val", None, {})
    return ValidationRun(evaluator.evaluate, build_image_grid(cfg, model, evaluator.query_samples))
