"""Networks of benchmarks: their configuration, random images, and their FLOPs."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from configs.loading import load
from data.records import Batch
from engine.supervision import Supervision, UpgradePolicy
from engine.train_step import BaselineStep, JointStep, TrainStep, phases_of
from modeling.build import build_networks, build_objectives
from modeling.privacy_networks import Networks, PrivacyNetworks
from solver.optimizers import build_optimizers
from tools.benchmarks.measuring import add_measuring_arguments
from utils.config_tree import changed

NUM_CLASSES = 751  # training identities of Market-1501


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all benchmarks of networks."""
    parser.add_argument(
        "--config_file", default="configs/AGW_baseline.yml", help="configuration (AGW_baseline.yml)"
    )
    add_measuring_arguments(parser)
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="keys of the configuration that override it"
    )


def network_config(config_file: str, opts: Sequence[str], device: str) -> CfgNode:
    """Return a configuration with random start weights."""
    fixed = ("MODEL.PRETRAIN_CHOICE", "none", "MODEL.DEVICE", device)
    return load(config_file, [*opts, *fixed])


def random_batch(cfg: CfgNode, count: int, device: torch.device) -> Batch:
    """Return a batch of random images with the identities of a P x K batch."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, *cfg.INPUT.IMG_SIZE)
    raw, other = (torch.rand(shape, generator=generator).mul_(2).sub_(1) for _ in range(2))
    index = torch.arange(count)
    label = (index // cfg.DATALOADER.NUM_INSTANCE).to(device)
    return Batch(raw.to(device), other.to(device), label, label, label, index)


def step_flops(cfg: CfgNode, count: int = 8) -> float:
    """Return the floating-point operations of one training image: convolutions and products.

    Torch counts them on tensors without values; a multiplication and an addition are two. The
    recomputation of SOLVER.GRAD_CHECKPOINT is not counted.
    """
    cfg = changed(cfg, {"SOLVER.GRAD_CHECKPOINT": False})
    with torch.device("meta"):
        nets = build_networks(cfg, NUM_CLASSES).train()
        batch, step = _empty_batch(cfg, count), _meta_step(cfg, nets)
    # Not on the meta device, since Adam reads its step counts.
    with FlopCounterMode(display=False) as counter:
        step(batch)
    return counter.get_total_flops() / count


def evaluation_flops(cfg: CfgNode, num_embedded: int, count: int = 2) -> float:
    """Return the floating-point operations of one image in an evaluation pass.

    Args:
        cfg: The configuration.
        num_embedded: How often each image is embedded.
        count: Images in the counted batch.
    """
    with torch.device("meta"), torch.inference_mode():
        nets = build_networks(cfg, NUM_CLASSES).eval()
        raw = torch.empty(count, 3, *cfg.INPUT.IMG_SIZE)
        with FlopCounterMode(display=False) as counter:
            for _ in range(num_embedded):
                nets.reid.embed(raw)
            if isinstance(nets, PrivacyNetworks):
                nets.recovery(nets.anonymizer(raw))
    return counter.get_total_flops() / count


def _empty_batch(cfg: CfgNode, count: int) -> Batch:
    images = torch.empty(count, 3, *cfg.INPUT.IMG_SIZE)
    label: Tensor = torch.empty(count, dtype=torch.int64)
    return Batch(images, images, label, label, label, label)


def _meta_step(cfg: CfgNode, nets: Networks) -> TrainStep:
    objectives = build_objectives(cfg, NUM_CLASSES, nets.reid.feature_size)
    optimizers = build_optimizers(cfg, nets, objectives.centers)
    phases = phases_of(nets, objectives)
    if isinstance(nets, PrivacyNetworks):
        supervision = Supervision(UpgradePolicy())
        return JointStep(nets, objectives, optimizers, supervision, contextlib.nullcontext, phases)
    return BaselineStep(nets, objectives, optimizers, contextlib.nullcontext, phases)
