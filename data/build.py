"""From the configuration to splits and loaders; the only place in ``data`` that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from yacs.config import CfgNode

from data.desensitize import Desensitizer, make_desensitizer
from data.loaders import EvalLoader, TrainLoader
from data.records import DatasetSplits, Sample
from data.registry import load_splits
from data.samplers import IdentitySampler
from data.store import PixelSource, ResidentPixels, StreamedPixels, plan_cache
from data.transforms import Augmentation
from layers.pixels import PixelSpace
from utils.errors import UserError
from utils.logger import get_logger

# Sources live as long as a loader uses them; a second loader over the same pictures shares them.
_SOURCES: WeakValueDictionary[tuple[object, ...], ResidentPixels | StreamedPixels] = (
    WeakValueDictionary()
)


def build_splits(cfg: CfgNode) -> DatasetSplits:
    """Read the data set that DATASETS.NAMES names.

    Raises:
        UserError: If it is unknown, missing or damaged.
    """
    return load_splits(
        cfg.DATASETS.NAMES,
        cfg.DATASETS.ROOT_DIR,
        msmt17_protocol=cfg.MSMT17.PROTOCOL,
        cuhk03_kind=cfg.CUHK03.KIND,
        synthetic_options={
            "identities": cfg.SYNTHETIC.IDENTITIES,
            "cameras": cfg.SYNTHETIC.CAMERAS,
            "images": cfg.SYNTHETIC.IMAGES,
            "seed": cfg.SYNTHETIC.SEED,
        },
    )


def build_train_loader(
    cfg: CfgNode,
    splits: DatasetSplits,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    sharers: int = 1,
) -> TrainLoader:
    """Make the loader of augmented P x K batches.

    Over the epochs a process sees every picture, so each keeps all of them.

    Args:
        cfg: The configuration.
        splits: The data set.
        device: Where batches are made.
        rank: This process of a distributed run, counted from 0.
        world_size: Number of processes; SOLVER.IMS_PER_BATCH is that of all of them together.
        sharers: How many of them share the memory of this machine.

    Raises:
        UserError: If there are too few identities for a batch, or pictures are bad.
    """
    if not splits.train:
        raise UserError(f"{splits.name} has no training images; train on another data set")
    desensitizer = _desensitizer(cfg)
    source = _source(cfg, splits.train, device, desensitizer, for_training=True, sharers=sharers)
    sampler = IdentitySampler(
        [splits.train[place].pid for place in source.usable.tolist()],
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_instances=cfg.DATALOADER.NUM_INSTANCE,
        seed=cfg.SOLVER.SEED,
        rank=rank,
        world_size=world_size,
    )
    augmentation = Augmentation(
        PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD),
        flip_probability=cfg.INPUT.PROB,
        padding=cfg.INPUT.PADDING,
        erase_probability=cfg.INPUT.RE_PROB,
    )
    return TrainLoader(
        source,
        splits.train,
        splits.label_of,
        sampler=sampler,
        desensitizer=desensitizer,
        augmentation=augmentation,
        seed=cfg.SOLVER.SEED,
        device=device,
    )


def build_eval_loader(
    cfg: CfgNode,
    samples: Sequence[Sample],
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    sharers: int = 1,
) -> EvalLoader:
    """Make a loader over samples in order, not augmented.

    Of several processes each takes, and decodes, a run of whole batches: those of all, one process
    after the other, are the batches of a single one, so that every number is the same.

    Decoded images are shared with every living loader over the same list: keep the loader, and
    validation decodes once.

    Args:
        cfg: The configuration.
        samples: All of them, whoever takes which.
        device: Where batches are made.
        rank: This process of a distributed run, counted from 0.
        world_size: Number of processes.
        sharers: How many of them share the memory of this machine.

    Raises:
        UserError: If pictures are bad.
    """
    size = cfg.TEST.IMS_PER_BATCH
    if world_size > 1:
        num_batches = -(-len(samples) // size)
        first, end = (size * (num_batches * one // world_size) for one in (rank, rank + 1))
        samples = samples[first:end]
    desensitizer = _desensitizer(cfg)
    return EvalLoader(
        _source(cfg, samples, device, desensitizer, for_training=False, sharers=sharers),
        samples,
        desensitizer=desensitizer,
        pixel_space=PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD),
        batch_size=size,
        device=device,
    )


def _desensitizer(cfg: CfgNode) -> Desensitizer:
    return make_desensitizer(cfg.INPUT.TYPE, cfg.INPUT.RADIUS, cfg.SOLVER.SEED)


def _source(
    cfg: CfgNode,
    samples: Sequence[Sample],
    device: torch.device,
    desensitizer: Desensitizer,
    *,
    for_training: bool,
    sharers: int,
) -> PixelSource:
    """Decode the pictures of a list, or take them from a loader that has them already."""
    paths = tuple(sample.path for sample in samples)
    size = (int(cfg.INPUT.IMG_SIZE[0]), int(cfg.INPUT.IMG_SIZE[1]))
    # Kept desensitized images serve every epoch of training; a validation is rare.
    keep = desensitizer.cacheable and for_training
    key = (
        paths, size, device, cfg.CACHE.MODE, cfg.CACHE.LIMIT_MIB, cfg.CACHE.SKIP_BAD,
        cfg.INPUT.TYPE, cfg.INPUT.RADIUS,
    )  # fmt: skip
    if key in _SOURCES:
        return _SOURCES[key]
    plan = plan_cache(
        len(paths),
        size,
        device,
        mode=cfg.CACHE.MODE,
        limit_mib=cfg.CACHE.LIMIT_MIB,
        with_desensitized=keep,
        taken_bytes=sum(source.num_bytes for source in _SOURCES.values()),
        sharers=sharers,
    )
    get_logger().info("Images: %s", plan.reason)
    workers, skip_bad = cfg.DATALOADER.NUM_WORKERS, cfg.CACHE.SKIP_BAD
    on_gpu = device.type != "cpu"
    source: ResidentPixels | StreamedPixels
    if plan.mode == "stream":
        # Workers blur on the CPU while it trains there; a GPU blurs faster than its workers.
        by_workers = desensitizer if desensitizer.cacheable and not on_gpu else None
        source = StreamedPixels(
            paths,
            size,
            num_workers=workers,
            skip_bad=skip_bad,
            desensitizer=by_workers,
            pin_memory=on_gpu,
        )
    else:
        resident = ResidentPixels(
            paths,
            size,
            device=device if plan.mode == "device" else "cpu",
            num_workers=workers,
            skip_bad=skip_bad,
            pin_memory=on_gpu and plan.mode == "memory",
        )
        if plan.keep_desensitized:
            resident.keep_desensitized(desensitizer)
        source = resident
    _SOURCES[key] = source
    return source
