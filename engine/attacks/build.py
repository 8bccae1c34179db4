"""From the configuration of a checkpoint to the scene of an attack."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from data.build import build_eval_loader, build_splits
from data.records import DatasetSplits, Sample
from engine.attacks.context import AttackContext, Makers, Settings
from engine.attacks.levels import Cast, ImageSet, Protector, choose_people
from engine.attacks.training import Workbench
from engine.checkpoint import LoadedWeights
from engine.distributed.group import device_of_rank
from engine.model import Model, load_pretrained, pretrained_model
from layers.pixels import PixelSpace
from modeling.build import build_objectives, build_reid
from modeling.privacy_networks import PrivacyNetworks
from modeling.unet import UNet
from utils.device import precision_name, resolve_precision
from utils.environment import environment_report
from utils.errors import UserError, naming_keys

FORMAT = 3  # raise it with every change that makes earlier results others, or their record
BATCH = 32
_DEFAULT_BUDGET = 4096


@dataclass(frozen=True)
class Plan:
    """What is to be attacked, before anything is decoded or trained.

    Attributes:
        settings: Seed and budgets.
        record: All that the numbers depend on besides the configuration, as plain values; but the
            precision is that which RUNTIME.PRECISION comes to on the device.
        versions: Software and machine.
        make_context: Builds the scene; attackers' networks are kept in the folder given.
    """

    settings: Settings
    record: dict[str, Any]
    versions: dict[str, str]
    make_context: Callable[[Path | None], AttackContext]


def plan_attacks(
    cfg: CfgNode,
    *,
    seed: int,
    budget: int | None,
    epochs: int,
    people: int,
    levels: Sequence[str],
    keys: int,
    start: str,
) -> Plan:
    """Read the data set and the weights, and check that they allow the attacks.

    Args:
        cfg: The checkpoint's configuration, with MODEL.PRETRAIN_CHOICE self.
        seed: See ``Settings``.
        budget: Likewise; None for as many public images as there are, at most 4,096.
        epochs: Likewise.
        people: Likewise.
        levels: Likewise.
        keys: Likewise.
        start: Likewise.

    Raises:
        UserError: The checkpoint has no anonymizer, or the data set has too few persons or images.
    """
    check_anonymizer(cfg)
    splits = build_splits(cfg)

    def cast(most: int) -> Cast:
        return choose_people(
            splits.train, splits.query, splits.gallery, budget=most, people=people, seed=seed
        )

    if budget is None:
        held_out = {sample.pid for sample in cast(1).validation}
        budget = min(_DEFAULT_BUDGET, sum(sample.pid not in held_out for sample in splits.train))
    settings = Settings(seed, budget, epochs, people, tuple(levels), keys, start)
    chosen = cast(budget)
    with naming_keys("MODEL.DEVICE", "MODEL.DEVICE_ID"):
        device = device_of_rank(cfg.MODEL.DEVICE, cfg.MODEL.DEVICE_ID)
    return Plan(
        settings,
        _record(cfg, settings, splits, device),
        environment_report(device),
        lambda folder: build_context(cfg, settings, chosen, folder),
    )


def build_context(
    cfg: CfgNode, settings: Settings, cast: Cast, folder: Path | None
) -> AttackContext:
    """Load the model of MODEL.PRETRAIN_DIR and decode the images of all roles.

    Args:
        cfg: The checkpoint's configuration.
        settings: Seed and budgets.
        cast: Samples of all roles.
        folder: Where attackers' networks are kept for a resume; None keeps none.

    Raises:
        UserError: The data or the checkpoint does not allow it.
    """
    model = pretrained_model(cfg, load_pretrained(cfg))
    nets = model.nets.eval()
    joint = nets if isinstance(nets, PrivacyNetworks) else None
    steps = -(-settings.budget // BATCH) * settings.epochs
    return AttackContext(
        settings=settings,
        public=_images(cfg, cast.public, model),
        validation=_images(cfg, cast.validation, model),
        private=_images(cfg, cast.private, model, cast.is_query),
        protector=Protector(
            joint.anonymizer if joint else None, model.device, model.autocast, model.pixels, BATCH
        ),
        reid=nets.reid,
        recovery=joint.recovery if joint else None,
        makers=_makers(cfg, settings.start),
        bench=Workbench(model.device, model.autocast, model.pixels, BATCH, steps, settings.seed),
        cross_camera=cfg.TEST.CROSS_CAMERA,
        folder=folder,
    )


def fingerprint(weights: LoadedWeights) -> str:
    """Return a digest of a checkpoint's weights, whatever file they lie in."""
    digest = hashlib.sha256()
    for letter, state in sorted(weights.networks.items()):
        for name, value in sorted(state.items()):
            digest.update(f"{letter}/{name}/{tuple(value.shape)}".encode())
            digest.update(_content(value))
    return digest.hexdigest()[:16]


def check_anonymizer(cfg: CfgNode) -> None:
    """Refuse a baseline.

    Raises:
        UserError: The checkpoint is of mode C.
    """
    if cfg.MODEL.MODE != "GCR":
        raise UserError(
            f"{cfg.MODEL.PRETRAIN_DIR} is a training of mode {cfg.MODEL.MODE}, which has no "
            "anonymizer to attack; expected a training with MODEL.MODE GCR"
        )


def _record(
    cfg: CfgNode, settings: Settings, splits: DatasetSplits, device: torch.device
) -> dict[str, Any]:
    values: dict[str, Any] = {"format": FORMAT, "weights": fingerprint(load_pretrained(cfg))}
    values |= {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}
    values["images"] = _digest(splits)
    # What auto comes to: a folder that is begun on a GPU must not go on in another arithmetic.
    precision = resolve_precision(cfg.RUNTIME.PRECISION, device)
    return values | {"RUNTIME.PRECISION": precision_name(precision)}


def _digest(splits: DatasetSplits) -> str:
    """Return a digest of which images a data set has, wherever it lies."""
    digest = hashlib.sha256()
    for role in (splits.train, splits.query, splits.gallery):
        rows = [f"{Path(s.path).name}/{s.pid}/{s.camid}" for s in role]
        digest.update("\n".join([*rows, ""]).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _makers(cfg: CfgNode, start: str) -> Makers:
    own = cfg.clone()
    own.defrost()
    own.MODEL.CENTER_LOSS = "off"  # its centres would need an optimiser of their own
    own.MODEL.PRETRAIN_CHOICE = start
    own.freeze()
    return Makers(
        recovery=lambda: UNet(own.UNET.NUM_DOWNS, own.MODEL.NGF),
        reid=lambda persons: build_reid(own, persons),
        objectives=lambda persons, size: build_objectives(own, persons, size),
    )


def _images(
    cfg: CfgNode, samples: Sequence[Sample], model: Model, is_query: Sequence[bool] = ()
) -> ImageSet:
    """Decode images; 8-bit on the CPU, since several levels of them are held at once."""
    loader = build_eval_loader(cfg, samples, torch.device("cpu"))
    raw, desensitized, index = [], [], []
    for batch in loader:
        raw.append(_pixels(batch.raw, model.pixels))
        desensitized.append(_pixels(batch.desensitized, model.pixels))
        index.append(batch.index)
    places = torch.cat(index).tolist()
    used = [samples[place] for place in places]
    return ImageSet(
        torch.cat(raw),
        torch.cat(desensitized),
        torch.tensor([sample.pid for sample in used]),
        torch.tensor([sample.camid for sample in used]),
        tuple(sample.subject for sample in used),
        torch.tensor([bool(is_query[place]) if is_query else False for place in places]),
    )


def _pixels(images: Tensor, pixels: PixelSpace) -> Tensor:
    return pixels.to_uint8(images).contiguous()


def _content(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()
