"""Build the context of attacks from the configuration of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from data.build import build_eval_loader, build_splits
from data.records import DatasetSplits, Sample
from engine.attacks.attack import AttackContext, NetworkFactories, Settings
from engine.attacks.levels import AttackSamples, ImageSet, choose_identities
from engine.attacks.training import TrainingSetup
from engine.checkpoint import LoadedWeights
from engine.distributed.processes import device_of_rank
from engine.model import Model, load_pretrained, pretrained_model
from modeling.build import build_objectives, build_reid
from modeling.gan import UNet
from modeling.privacy_networks import PrivacyNetworks
from utils.device import precision_name, resolve_precision
from utils.environment import environment_report
from utils.errors import UserError, naming_keys
from utils.logger import Progress

FORMAT = 4  # increase it with every change of the numbers or of the record
BATCH = 32


@dataclass(frozen=True)
class Plan:
    """A planned run of attacks, before images are decoded or networks trained."""

    settings: Settings  # seed and budgets
    # everything that the numbers depend on in addition to the configuration, as plain values, and
    # the precision that RUNTIME.PRECISION resolves to
    record: dict[str, Any]
    versions: dict[str, str]  # software and machine
    # builds the context; its argument is the folder for attackers' networks
    make_context: Callable[[Path | None], AttackContext]


def plan_attacks(cfg: CfgNode, settings: Settings) -> Plan:
    """Read the data set and the weights, and check that they allow the attacks.

    ``cfg`` is the configuration of the checkpoint, with MODEL.PRETRAIN_CHOICE self. A budget of 0
    means all public images, at most 4,096.

    Raises:
        UserError: The checkpoint has no anonymizer, or the data set too few identities or images.
    """
    if cfg.MODEL.MODE != "GCR":
        raise UserError(
            f"{cfg.MODEL.PRETRAIN_DIR} is a training of mode {cfg.MODEL.MODE}, which has no "
            "anonymizer to attack; expected a training with MODEL.MODE GCR"
        )
    splits = build_splits(cfg)
    samples = choose_identities(
        splits.train, splits.query, splits.gallery,
        budget=settings.budget, people=settings.people, seed=settings.seed,
    )  # fmt: skip
    settings = replace(settings, budget=len(samples.public))
    with naming_keys("MODEL.DEVICE", "MODEL.DEVICE_ID"):
        device = device_of_rank(cfg.MODEL.DEVICE, cfg.MODEL.DEVICE_ID)
    return Plan(
        settings,
        _record(cfg, settings, splits, device),
        environment_report(device),
        lambda folder: build_context(cfg, settings, samples, folder),
    )


def build_context(
    cfg: CfgNode, settings: Settings, samples: AttackSamples, folder: Path | None
) -> AttackContext:
    """Load the model in MODEL.PRETRAIN_DIR and decode all images.

    Attackers' networks are saved in ``folder`` for a resume; None to save none.

    Raises:
        UserError: The data or the checkpoint cannot be used.
    """
    model = pretrained_model(cfg, load_pretrained(cfg))
    nets = model.nets.eval()
    assert isinstance(nets, PrivacyNetworks)  # checked in ``plan_attacks``
    steps = -(-settings.budget // BATCH) * settings.epochs
    return AttackContext(
        settings=settings,
        public=_images(cfg, samples.public, model),
        validation=_images(cfg, samples.validation, model),
        private=_images(cfg, samples.private, model, samples.is_query),
        anonymizer=nets.anonymizer,
        reid=nets.reid,
        recovery=nets.recovery,
        factories=_factories(cfg, settings.start),
        bench=TrainingSetup(
            model.device, model.autocast, model.pixels, BATCH, steps, settings.seed
        ),
        cross_camera=cfg.TEST.CROSS_CAMERA,
        folder=folder,
    )


def fingerprint(weights: LoadedWeights) -> str:
    """Return a digest of a checkpoint's weights; the same for native and official files."""
    digest = hashlib.sha256()
    for letter, state in sorted(weights.networks.items()):
        for name, value in sorted(state.items()):
            digest.update(f"{letter}/{name}/{tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _record(
    cfg: CfgNode, settings: Settings, splits: DatasetSplits, device: torch.device
) -> dict[str, Any]:
    values: dict[str, Any] = {"format": FORMAT, "weights": fingerprint(load_pretrained(cfg))}
    values |= {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}
    values["images"] = _digest(splits)
    # Record what auto resolves to: a run that starts on a GPU must not continue in another
    # precision.
    precision = resolve_precision(cfg.RUNTIME.PRECISION, device)
    return values | {"RUNTIME.PRECISION": precision_name(precision)}


def _digest(splits: DatasetSplits) -> str:
    """Return a digest of the images of a data set; it does not depend on the folder."""
    digest = hashlib.sha256()
    for role in (splits.train, splits.query, splits.gallery):
        rows = [f"{Path(s.path).name}/{s.pid}/{s.camid}" for s in role]
        digest.update("\n".join([*rows, ""]).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _factories(cfg: CfgNode, start: str) -> NetworkFactories:
    own = cfg.clone()
    own.defrost()
    own.MODEL.CENTER_LOSS = "off"  # the centres would need their own optimiser
    own.MODEL.PRETRAIN_CHOICE = start
    own.LOSS.REID = 1.0  # also against an owner who trained the U-Nets alone
    own.freeze()
    return NetworkFactories(
        recovery=lambda: UNet(own.UNET.NUM_DOWNS, own.MODEL.NGF),
        reid=lambda persons: build_reid(own, persons),
        objectives=lambda persons, size: build_objectives(own, persons, size),
    )


def _images(
    cfg: CfgNode, samples: Sequence[Sample], model: Model, is_query: Sequence[bool] = ()
) -> ImageSet:
    """Decode images to 8 bits on the CPU, because several levels are in memory at once."""
    loader = build_eval_loader(cfg, samples, torch.device("cpu"))
    raw, desensitized, index = [], [], []
    with Progress(loader.num_images, "Read images") as bar:
        for batch in loader:
            raw.append(model.pixels.to_uint8(batch.raw))
            desensitized.append(model.pixels.to_uint8(batch.desensitized))
            index.append(batch.index)
            bar.update(len(batch))
    indices = torch.cat(index).tolist()
    used = [samples[each] for each in indices]
    return ImageSet(
        torch.cat(raw),
        torch.cat(desensitized),
        torch.tensor([sample.pid for sample in used]),
        torch.tensor([sample.camid for sample in used]),
        tuple(sample.subject for sample in used),
        torch.tensor([bool(is_query) and is_query[each] for each in indices]),
    )
