"""Build splits and loaders from the configuration; no other module of ``data`` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from yacs.config import CfgNode

from data.desensitize import Desensitizer, make_desensitizer
from data.loaders import EvalLoader, TrainLoader
from data.problems import check_positives
from data.records import DatasetSplits, Sample
from data.registry import load_splits
from data.samplers import IdentitySampler
from data.store import (
    PixelSource,
    ResidentPixels,
    StreamedPixels,
    plan_cache,
    report_bad,
    undecodable,
)
from data.transforms import Augmentation
from layers.pixels import PixelSpace
from utils.errors import UserError, naming_keys
from utils.logger import get_logger
from utils.world import ALONE, World

# Loaders over the same images share one source. It is freed with the last of them.
_SOURCES: WeakValueDictionary[tuple[object, ...], PixelSource] = WeakValueDictionary()


def build_splits(cfg: CfgNode) -> DatasetSplits:
    """Load the data set of DATASETS.NAMES.

    Raises:
        UserError: It is unknown, missing or damaged.
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


def check_before_training(cfg: CfgNode, splits: DatasetSplits, here: World = ALONE) -> None:
    """Check what the evaluations of a training need, so that none fails after hours.

    A training is evaluated on the validation split, or without one on the test split. Its queries
    need matches, and its images must be decodable: each rank decodes its part of them once.

    Raises:
        UserError: There are no training images, the queries cannot be scored, or images cannot be
            decoded (unless CACHE.SKIP_BAD is True: the evaluation leaves them out).
    """
    _require_training_images(splits)
    title, query, gallery = "test", splits.query, splits.gallery
    if splits.has_validation:
        title, query, gallery = "validation", splits.val_query, splits.val_gallery
    check_positives(query, gallery, cross_camera=cfg.TEST.CROSS_CAMERA, title=title)
    if not cfg.CACHE.SKIP_BAD:
        paths = sorted({sample.path for sample in (*query, *gallery)})[here.rank :: here.size]
        errors = undecodable(paths, cfg.DATALOADER.NUM_WORKERS)
        if errors:
            report_bad(errors, len(paths), skip_bad=False)


def _require_training_images(splits: DatasetSplits) -> None:
    if not splits.train:
        raise UserError(
            f"{splits.name} has no training images, so it can only be evaluated "
            "(TEST.EVALUATE_ONLY on); add them, or train on another data set"
        )


def build_train_loader(
    cfg: CfgNode, splits: DatasetSplits, device: torch.device, here: World = ALONE
) -> TrainLoader:
    """Return the loader of augmented P x K batches on a device.

    Every process keeps all images, because over the epochs it needs each of them.
    SOLVER.IMS_PER_BATCH counts the images of all processes.

    Raises:
        UserError: There are too few identities for a batch, or images cannot be decoded.
    """
    _require_training_images(splits)
    desensitizer = _desensitizer(cfg)
    source = _source(cfg, splits.train, device, desensitizer, here, for_training=True)
    with naming_keys("SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE"):
        sampler = IdentitySampler(
            [splits.train[index].pid for index in source.usable.tolist()],
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_instances=cfg.DATALOADER.NUM_INSTANCE,
            seed=cfg.SOLVER.SEED,
            rank=here.rank,
            world_size=here.size,
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
        desensitize=cfg.INPUT.DESENSITIZE,
        augmentation=augmentation,
        seed=cfg.SOLVER.SEED,
        device=device,
    )


def build_eval_loader(
    cfg: CfgNode, samples: Sequence[Sample], device: torch.device, here: World = ALONE
) -> EvalLoader:
    """Return a loader over samples in order, without augmentation.

    In a distributed run each rank loads a range of whole batches of the given samples. The batches
    of all ranks in rank order equal those of one process, so every score is the same.

    Loaders over the same list share decoded images: keep the loader, and every validation after
    the first decodes nothing.

    Raises:
        UserError: Images cannot be decoded.
    """
    size = cfg.TEST.IMS_PER_BATCH
    if here.size > 1:
        num_batches = -(-len(samples) // size)
        first, end = (size * (num_batches * r // here.size) for r in (here.rank, here.rank + 1))
        samples = samples[first:end]
    desensitizer = _desensitizer(cfg)
    return EvalLoader(
        _source(cfg, samples, device, desensitizer, here, for_training=False),
        samples,
        desensitizer=desensitizer,
        pixel_space=PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD),
        batch_size=size,
        device=device,
    )


def _desensitizer(cfg: CfgNode) -> Desensitizer:
    with naming_keys("INPUT.TYPE", "INPUT.RADIUS"):
        return make_desensitizer(cfg.INPUT.TYPE, cfg.INPUT.RADIUS, cfg.SOLVER.SEED)


def _source(
    cfg: CfgNode,
    samples: Sequence[Sample],
    device: torch.device,
    desensitizer: Desensitizer,
    here: World,
    *,
    for_training: bool,
) -> PixelSource:
    """Return the images of a list: those of a living loader, or newly decoded ones."""
    paths = tuple(sample.path for sample in samples)
    size = (int(cfg.INPUT.IMG_SIZE[0]), int(cfg.INPUT.IMG_SIZE[1]))
    # Whether the source desensitizes. It cannot do so after the crop, which differs in each epoch.
    early = desensitizer.cacheable and not (for_training and cfg.INPUT.DESENSITIZE == "after")
    # Training reads desensitized images in every epoch. Evaluation is rare: they are not kept.
    keep = early and for_training
    key = (
        paths, size, device, cfg.CACHE.MODE, cfg.CACHE.LIMIT_MIB, cfg.CACHE.SKIP_BAD,
        cfg.INPUT.TYPE, cfg.INPUT.RADIUS,
    )  # fmt: skip
    if key in _SOURCES:
        return _SOURCES[key]
    with naming_keys("CACHE.MODE", "CACHE.LIMIT_MIB"):
        plan = plan_cache(
            len(paths),
            size,
            device,
            mode=cfg.CACHE.MODE,
            limit_mib=cfg.CACHE.LIMIT_MIB,
            with_desensitized=keep,
            taken_bytes=sum(source.num_bytes for source in _SOURCES.values()),
            sharers=here.local_size,
        )
    get_logger().info("Images: %s", plan.reason)
    workers, skip_bad = cfg.DATALOADER.NUM_WORKERS, cfg.CACHE.SKIP_BAD
    on_gpu = device.type != "cpu"
    source: PixelSource
    if plan.mode == "stream":
        source = StreamedPixels(
            paths,
            size,
            num_workers=workers,
            skip_bad=skip_bad,
            desensitizer=desensitizer if early else None,
            pin_memory=on_gpu,
        )
    else:
        source = resident = ResidentPixels(
            paths,
            size,
            device=device if plan.mode == "device" else "cpu",
            num_workers=workers,
            skip_bad=skip_bad,
            pin_memory=on_gpu and plan.mode == "memory",
        )
        if plan.keep_desensitized:
            resident.keep_desensitized(desensitizer)
    _SOURCES[key] = source
    return source
