"""Every key of the configuration: default, allowed values, meaning and unit.

Published keys keep their names and values; the numbers are those of the published method (AGW
re-ID, pix2pix networks). What only two keys together can get wrong is checked in ``validation.py``.
"""

from __future__ import annotations

import math

from yacs.config import CfgNode

from configs.schema import Flag, Key, Number, OneOf, OnOff, PathText, Registered, Sequence, Text

BACKBONES = Registered("modeling.backbones.registry:REID_DESIGNS", prefix="timm:")
DESENSITIZERS = Registered("data.desensitize:DESENSITIZERS")
CIPHERS = Registered("modeling.build:CIPHERS")
GAN_LOSSES = Registered("layers.losses:GAN_LOSSES")

_WEIGHT = Number(low=0)
_PROBABILITY = Number(low=0, high=1)
_POSITIVE = Number(low=0, above=True)
_COUNT = Number(whole=True, low=1)
_CHANNELS = Sequence(Number(low=0, high=1), length=3)

# fmt: off
KEYS: tuple[Key, ...] = (
    # ---- the networks, and what is trained of them
    Key("MODEL.DEVICE", "auto", Text("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d+)?"),
        "where to compute; auto takes a CUDA device where there is one"),
    Key("MODEL.DEVICE_ID", "0", Text("the number of one GPU, such as 0", r"\d+"),
        "which GPU `cuda` and `auto` mean"),
    Key("MODEL.NAME", "resnet50_nl", BACKBONES,
        "backbone of the re-ID network; _nl has non-local blocks and generalised-mean pooling; "
        "timm:<name> is any model of the timm package, such as timm:tf_efficientnet_lite0"),
    Key("MODEL.LAST_STRIDE", 1, Number(whole=True, low=1, high=2), "stride of the last stage"),
    Key("MODEL.STEM_RELU", False, Flag(), "ReLU after the stem; AGW checkpoints have none"),
    Key("MODEL.PRETRAIN_CHOICE", "imagenet", OneOf(("imagenet", "self", "none")),
        "start from ImageNet weights, from this project's checkpoint, or from random weights"),
    Key("MODEL.PRETRAIN_PATH", "", PathText(optional=True),
        "file or folder with ImageNet weights, searched first"),
    Key("MODEL.PRETRAIN_DIR", "", PathText(optional=True),
        "folder with the checkpoint that PRETRAIN_CHOICE self loads"),
    Key("MODEL.CENTER_LOSS", "on", OnOff(), "whether the centre loss is added"),
    Key("MODEL.WEIGHT_REGULARIZED_TRIPLET", "on", OnOff(),
        "weighted regularised triplet loss; off: batch-hard triplet loss with SOLVER.MARGIN"),
    Key("MODEL.MODE", "GCR", OneOf(("GCR", "C")),
        "GCR trains all five networks; C the re-ID network on raw and desensitized images"),
    Key("MODEL.OUTPUT_MODE", "both", OneOf(("both", "origin", "protected")),
        "images the re-ID loss is taken on: raw (origin), protected, or both"),
    Key("MODEL.GAN_MODE", "vanilla", GAN_LOSSES, "cross-entropy on logits, or squared error"),
    Key("MODEL.NGF", 64, _COUNT, "channels of the U-Nets' first convolution"),
    Key("MODEL.NDF", 64, _COUNT, "channels of the discriminators' first convolution"),
    Key("MODEL.VAL_R1", math.inf, Number(low=0, high=1, extra=(math.inf,)),
        "raw->protected rank-1 on validation [0, 1] that supervision upgradation asks for; "
        "inf: never upgrade; mode C has nothing to upgrade"),
    Key("MODEL.VAL_R1_SLACK", 0.05, _PROBABILITY, "how far below VAL_R1 a rank-1 still qualifies"),
    Key("MODEL.PSNR", 1.0, Number(low=-100, high=100),
        "dB of PSNR by which anonymized images may be closer to raw than desensitized ones; "
        "negative: must be further away"),
    Key("MODEL.SSIM", 0.05, Number(low=-2, high=2), "the same for SSIM"),
    Key("UNET.NUM_DOWNS", 7, Number(whole=True, low=5, high=10),
        "down-samplings of the U-Nets; both image sides must be multiples of 2 ** NUM_DOWNS"),
    # ---- losses
    Key("LOSS.REID", 1.0, _WEIGHT, "weight of the re-ID losses"),
    Key("LOSS.ANONYMIZATION", 100.0, _WEIGHT, "weight of L1(anonymized, target)"),
    Key("LOSS.RECOVERY", 100.0, _WEIGHT, "weight of L1(recovered, raw)"),
    Key("LOSS.GAN", 1.0, _WEIGHT, "weight of both adversarial losses"),
    Key("LOSS.LABEL_SMOOTHING", 0.1, Number(low=0, high=1), "share spread over all classes"),
    Key("LOSS.TRIPLET_NORMALIZED", False, Flag(),
        "weighted regularised triplet loss on L2-normalised features"),
    # ---- images
    Key("INPUT.IMG_SIZE", (256, 128), Sequence(Number(whole=True, low=16, high=4096), length=2),
        "height and width (px) that every image is resized to"),
    Key("INPUT.PROB", 0.5, _PROBABILITY, "probability of a horizontal flip"),
    Key("INPUT.RE_PROB", 0.5, _PROBABILITY, "probability of random erasing"),
    Key("INPUT.PADDING", 10, Number(whole=True, low=0, high=1024),
        "zeros (px) around the image before the random crop"),
    Key("INPUT.PIXEL_MEAN", (0.485, 0.456, 0.406), _CHANNELS, "RGB mean, of values in [0, 1]"),
    Key("INPUT.PIXEL_STD", (0.5, 0.5, 0.5), Sequence(Number(low=0, high=10, above=True), length=3),
        "RGB divisor after the mean is taken off"),
    Key("INPUT.TYPE", "mosaic", DESENSITIZERS, "conventional desensitization method"),
    Key("INPUT.RADIUS", 24.0, Number(low=0, high=4096, above=True),
        "its strength: mosaic tile (px, whole), blur radius (px), standard deviation of the noise"),
    # ---- data
    Key("DATASETS.NAMES", "synthetic", Text("the name of one data set", r"(?s).*\S.*"),
        "data set, such as market1501_val, folder:PATH or csv:FILE"),
    Key("DATASETS.ROOT_DIR", "./datasets", PathText(), "folder that holds the data sets"),
    Key("SYNTHETIC.IDENTITIES", 64, Number(whole=True, low=2, high=4000),
        "people of the synthetic set to train on; a quarter as many validate, half as many test"),
    Key("SYNTHETIC.CAMERAS", 6, Number(whole=True, low=2, high=9), "its cameras"),
    Key("SYNTHETIC.IMAGES", 4, Number(whole=True, low=2, high=50),
        "its images per identity and camera"),
    Key("SYNTHETIC.SEED", 1, Number(whole=True, low=0, high=2**31 - 1),
        "what its people are drawn from"),
    Key("MSMT17.PROTOCOL", "train", OneOf(("train", "trainval")),
        "train on list_train, or on list_train and list_val"),
    Key("CUHK03.KIND", "labeled", OneOf(("labeled", "detected")),
        "boxes drawn by hand, or by a detector"),
    Key("DATALOADER.NUM_WORKERS", -1,
        Number(whole=True, low=0, high=1024, extra=(-1,), names=(("auto", -1),)),
        "threads that decode images; auto (-1): by the number of cores"),
    Key("DATALOADER.NUM_INSTANCE", 4, Number(whole=True, low=2, high=1024),
        "images of each identity in a batch"),
    Key("CACHE.MODE", "auto", OneOf(("auto", "device", "memory", "stream")),
        "where decoded images are kept; stream keeps none"),
    Key("CACHE.LIMIT_MIB", -1, Number(whole=True, low=0, extra=(-1,), names=(("auto", -1),)),
        "most memory (MiB) for them; auto (-1): a quarter of what a GPU has free, half of what "
        "the host has"),
    Key("CACHE.SKIP_BAD", False, Flag(), "leave unreadable images out instead of stopping"),
    # ---- training
    Key("SOLVER.MAX_EPOCHS", 120, _COUNT, "epochs, counted from 1"),
    Key("SOLVER.BASE_LR", 3.5e-4, _POSITIVE, "learning rate of Adam after the warm-up"),
    Key("SOLVER.WEIGHT_DECAY", 5e-4, _WEIGHT, "L2 penalty"),
    Key("SOLVER.MARGIN", 0.3, _WEIGHT, "margin of the batch-hard triplet loss"),
    Key("SOLVER.CENTER_LR", 0.5, _WEIGHT, "learning rate of the centres"),
    Key("SOLVER.CENTER_LOSS_WEIGHT", 5e-4, _POSITIVE, "weight of the centre loss"),
    Key("SOLVER.STEPS", (40, 80), Sequence(_COUNT), "epochs from which the rate is times GAMMA"),
    Key("SOLVER.GAMMA", 0.1, Number(low=0, high=1, above=True), "factor of the rate at each step"),
    Key("SOLVER.WARMUP_FACTOR", 0.01, _PROBABILITY, "factor the warm-up starts from"),
    Key("SOLVER.WARMUP_ITERS", 10, Number(whole=True, low=0), "epochs of warm-up"),
    Key("SOLVER.WARMUP_METHOD", "linear", OneOf(("linear", "constant")), "shape of the warm-up"),
    Key("SOLVER.IMS_PER_BATCH", 80, _COUNT, "images in a training batch"),
    Key("SOLVER.GRAD_CHECKPOINT", False, Flag(),
        "compute activations again in the backward pass instead of keeping them: the same numbers "
        "with less memory and about a fifth more FLOPs, for small GPUs"),
    Key("SOLVER.VAL_PERIOD", 10, _COUNT, "epochs between validations"),
    Key("SOLVER.CHECKPOINT_PERIOD", 1, _COUNT, "epochs between checkpoints"),
    Key("SOLVER.LOG_PERIOD", 20, _COUNT, "batches between log lines"),
    Key("SOLVER.SEED", 1, Number(whole=True, low=0, high=2**63 - 1), "seed of everything drawn"),
    Key("SOLVER.RESUME", False, Flag(), "go on from the checkpoint in OUTPUT_DIR"),
    # ---- how it is computed
    Key("RUNTIME.PRECISION", "auto", OneOf(("auto", "float32", "bfloat16")),
        "type of the networks' arithmetic; auto: bfloat16 where the hardware has it"),
    Key("RUNTIME.CHANNELS_LAST", True, Flag(), "channels-last memory layout"),
    Key("RUNTIME.COMPILE", "auto", OneOf(("auto", "on", "off")),
        "whether torch.compile fuses the networks, in a run of one process; auto: on GPUs, in "
        "trainings of a million images of 256 x 128 and more"),
    Key("RUNTIME.CUDNN_BENCHMARK", False, Flag(),
        "in training on GPUs let cuDNN try its kernels once and keep the fastest, instead of going "
        "by its rules: rounding may then differ from run to run"),
    Key("RUNTIME.THREADS", 0, Number(whole=True, low=0, high=4096),
        "CPU threads; 0: as torch chooses"),
    # ---- evaluation
    Key("TEST.IMS_PER_BATCH", 256, _COUNT, "images in an evaluation batch"),
    Key("TEST.RE_RANKING", "off", OnOff(), "k-reciprocal re-ranking beside the plain scores"),
    Key("TEST.EVALUATE_ONLY", "off", OnOff(), "evaluate a checkpoint and train nothing"),
    Key("TEST.RETRIEVE_WITH_KEY", "on", OnOff(),
        "re-ID sees decrypted protected images; off: encrypted ones"),
    Key("TEST.RECOVERY_WITH_KEY", "on", OnOff(),
        "recovery sees decrypted anonymized images; off: encrypted ones"),
    Key("TEST.CROSS_CAMERA", True, Flag(),
        "ignore gallery images of the query's identity and camera; False for single-camera sets"),
    Key("EVAL.SPLIT", "test", OneOf(("test", "val")), "split that TEST.EVALUATE_ONLY scores"),
    Key("EVAL.DETAILS", "off", OnOff(),
        "also write intervals, verification rates, single-shot scores and per-query results"),
    Key("EVAL.REPORT", "on", OnOff(), "write report.html, one page about the run"),
    Key("ISED.SCHEME", "additive", CIPHERS,
        "encryption of anonymized images; additive is the published one and not secure"),
    Key("OUTPUT_DIR", "./log/run", PathText(), "folder for logs, checkpoints and results"),
)
# fmt: on

KEY_BY_NAME: dict[str, Key] = {key.name: key for key in KEYS}
SECTIONS: frozenset[str] = frozenset(
    name.rsplit(".", depth)[0] for name in KEY_BY_NAME for depth in range(1, name.count(".") + 1)
)


def default_config() -> CfgNode:
    """Return a new tree of all keys at their defaults, not frozen."""
    cfg = CfgNode()
    for key in KEYS:
        set_value(cfg, key.name, key.default)
    return cfg


def set_value(cfg: CfgNode, name: str, value: object) -> None:
    """Set the key of a dotted name, making the sections on the way."""
    *sections, leaf = name.split(".")
    for section in sections:
        cfg = cfg.setdefault(section, CfgNode())
    cfg[leaf] = value
