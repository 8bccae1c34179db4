"""Every key of the configuration: default, allowed values, meaning and unit.

Names and values of the published method (AGW re-ID, pix2pix networks) are kept. Rules between keys
are in ``validation.py``. Every number has an upper bound, so that a wrong or hostile configuration
file cannot allocate all memory.
"""

from __future__ import annotations

import math

from yacs.config import CfgNode

from configs.schema import (
    Flag,
    Key,
    Number,
    NumberOrShare,
    OneOf,
    OnOff,
    PathText,
    Registered,
    Sequence,
    Text,
)
from utils.config_tree import set_value
from utils.memory import MAX_CHANNELS, MAX_IMAGE_SIDE, NUM_DOWNS
from utils.metric_writer import TRACKERS

BACKBONES = Registered("modeling.backbones.registry:REID_DESIGNS", prefix="timm:")
DESENSITIZERS = Registered("data.desensitize:DESENSITIZERS")
CIPHERS = Registered("modeling.build:CIPHERS")
GAN_LOSSES = Registered("layers.losses:GAN_LOSSES")
OUTPUT_MODES = Registered("modeling.privacy_networks:OUTPUT_MODES")
PRECISIONS = Registered("utils.device:PRECISIONS")

_WEIGHT = Number(low=0, high=10**9)
_PROBABILITY = Number(low=0, high=1)
_POSITIVE = Number(low=0, above=True, high=10**9)
_COUNT = Number(whole=True, low=1, high=10**9)
_BATCH = Number(whole=True, low=1, high=2**16)
_WIDTH = Number(whole=True, low=1, high=MAX_CHANNELS)
_SIZE = Sequence(Number(whole=True, low=16, high=MAX_IMAGE_SIDE), length=2)
_CHANNELS = Sequence(Number(low=0, high=1), length=3)

# fmt: off
KEYS: tuple[Key, ...] = (
    # ---- networks
    Key("MODEL.DEVICE", "auto", Text("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:\d{1,4})?"),
        "where to compute; auto: a CUDA device if there is one"),
    Key("MODEL.DEVICE_ID", "0", Text("the number of one GPU, such as 0", r"\d{1,4}"),
        "number of the GPU that `cuda` and `auto` mean"),
    Key("MODEL.NAME", "resnet50_nl", BACKBONES,
        "backbone of the re-ID network; _nl has non-local blocks and generalised-mean pooling; "
        "timm:<name> is any model of the timm package, such as timm:tf_efficientnet_lite0"),
    Key("MODEL.LAST_STRIDE", 1, Number(whole=True, low=1, high=2), "stride of the last stage"),
    Key("MODEL.STEM_RELU", False, Flag(),
        "ReLU after the stem; AGW checkpoints were trained without"),
    Key("MODEL.PRETRAIN_CHOICE", "imagenet", OneOf(("imagenet", "self", "none")),
        "start from ImageNet weights, from this project's checkpoint, or from random weights"),
    Key("MODEL.PRETRAIN_PATH", "", PathText(optional=True),
        "file or folder with ImageNet weights, searched first"),
    Key("MODEL.PRETRAIN_DIR", "", PathText(optional=True),
        "folder of the checkpoint that PRETRAIN_CHOICE self loads; for a training, a re-ID network "
        "alone (mode C) is enough"),
    Key("MODEL.CENTER_LOSS", "on", OnOff(), "whether the centre loss is added"),
    Key("MODEL.WEIGHT_REGULARIZED_TRIPLET", "on", OnOff(),
        "weighted regularised triplet loss; off: batch-hard triplet loss with SOLVER.MARGIN"),
    Key("MODEL.MODE", "GCR", OneOf(("GCR", "C")),
        "GCR trains all five networks; C the re-ID network on raw and desensitized images"),
    Key("MODEL.OUTPUT_MODE", "both", OUTPUT_MODES,
        "images of the re-ID loss: raw (origin), protected, or both; joined: both in one batch, "
        "so that batch norm is trained on the mixture that it is evaluated with; none: the re-ID "
        "network is neither run nor trained (accuracy 0); its U-Nets can start a joint training"),
    Key("MODEL.GAN_MODE", "vanilla", GAN_LOSSES, "cross-entropy on logits, or squared error"),
    Key("MODEL.NGF", 64, _WIDTH, "channels of the U-Nets' first convolution"),
    Key("MODEL.NDF", 64, _WIDTH, "channels of the discriminators' first convolution"),
    Key("MODEL.VAL_R1", math.inf,
        NumberOrShare(Number(low=0, high=1, extra={"inf": math.inf}), "raw->raw rank-1"),
        "raw->protected rank-1 on validation [0, 1] that supervision upgradation requires; 0.9x: "
        "more than 90 % of the raw->raw rank-1 of the same validation; inf: never upgrade; not "
        "used in mode C"),
    Key("MODEL.VAL_R1_SLACK", 0.05, _PROBABILITY,
        "a rank-1 qualifies if it is at most this far below VAL_R1; not used if VAL_R1 is a share"),
    Key("MODEL.TEACHER_EMA", 0.0, Number(low=0, high=0.999999),
        "decay per step of a moving average of the anonymizer, which is the target after an "
        "upgrade; 0: the frozen copy, as published"),
    Key("MODEL.PSNR", 1.0, Number(low=-100, high=100),
        "dB of PSNR by which anonymized images may be closer to raw than desensitized ones; "
        "negative: must be further away"),
    Key("MODEL.SSIM", 0.05, Number(low=-2, high=2), "the same for SSIM"),
    Key("UNET.NUM_DOWNS", 7, Number(whole=True, low=NUM_DOWNS[0], high=NUM_DOWNS[1]),
        "down-samplings of the U-Nets; both image sides must be multiples of 2 ** NUM_DOWNS"),
    # ---- losses
    Key("LOSS.REID", 1.0, _WEIGHT, "weight of the re-ID losses"),
    Key("LOSS.ANONYMIZATION", 100.0, _WEIGHT, "weight of L1(anonymized, target)"),
    Key("LOSS.RECOVERY", 100.0, _WEIGHT, "weight of L1(recovered, raw)"),
    Key("LOSS.GAN", 1.0, _WEIGHT, "weight of both adversarial losses"),
    Key("LOSS.LABEL_SMOOTHING", 0.1, Number(low=0, high=1), "share spread over all classes"),
    Key("LOSS.TRIPLET_NORMALIZED", False, Flag(),
        "weighted regularised triplet loss on L2-normalised features"),
    Key("LOSS.ALIGNMENT", 0.0, _WEIGHT,
        "weight of the cosine distance of protected embeddings to the raw image's, which are "
        "fixed; 0: off, as published"),
    Key("LOSS.CONSISTENCY", 0.0, _WEIGHT,
        "weight of the KL divergence of predictions on protected images from those on raw images, "
        "which are fixed; 0: off, as published"),
    Key("LOSS.CROSS_TRIPLET", 0.0, _WEIGHT,
        "weight of the metric loss of raw and protected images as one batch; 0: off, as published"),
    # ---- images
    Key("INPUT.IMG_SIZE", (256, 128), _SIZE,
        "height and width (px) that every image is resized to"),
    Key("INPUT.PROB", 0.5, _PROBABILITY, "probability of a horizontal flip"),
    Key("INPUT.RE_PROB", 0.5, _PROBABILITY, "probability of random erasing"),
    Key("INPUT.PADDING", 10, Number(whole=True, low=0, high=1024),
        "zeros (px) around the image before the random crop"),
    Key("INPUT.PIXEL_MEAN", (0.485, 0.456, 0.406), _CHANNELS, "RGB mean, of values in [0, 1]"),
    Key("INPUT.PIXEL_STD", (0.5, 0.5, 0.5), Sequence(Number(low=0, high=10, above=True), length=3),
        "RGB divisor after the mean is subtracted"),
    Key("INPUT.TYPE", "mosaic", DESENSITIZERS, "conventional desensitization method"),
    Key("INPUT.RADIUS", 24.0, Number(low=0, high=4096, above=True),
        "its strength: mosaic tile (px, whole), blur radius (px), standard deviation of the noise"),
    Key("INPUT.DESENSITIZE", "before", OneOf(("before", "after")),
        "desensitize training images before they are flipped and cropped, as published, or after; "
        "only then can the anonymizer see where the tiles of a mosaic begin; blur is then computed "
        "in each epoch"),
    # ---- data
    Key("DATASETS.NAMES", "synthetic", Text("the name of one data set", r"(?s).*\S.*"),
        "data set, such as market1501_val, folder:PATH or csv:FILE"),
    Key("DATASETS.ROOT_DIR", "./datasets", PathText(), "folder that contains the data sets"),
    Key("SYNTHETIC.IDENTITIES", 64, Number(whole=True, low=2, high=4000),
        "people of the synthetic set to train on; a quarter as many validate, half as many test"),
    Key("SYNTHETIC.CAMERAS", 6, Number(whole=True, low=2, high=9), "its cameras"),
    Key("SYNTHETIC.IMAGES", 4, Number(whole=True, low=2, high=50),
        "its images per identity and camera"),
    Key("SYNTHETIC.SEED", 1, Number(whole=True, low=0, high=2**31 - 1),
        "seed that its people are drawn from"),
    Key("MSMT17.PROTOCOL", "train", OneOf(("train", "trainval")),
        "train on list_train, or on list_train and list_val"),
    Key("CUHK03.KIND", "labeled", OneOf(("labeled", "detected")),
        "boxes drawn by hand, or by a detector"),
    Key("DATALOADER.NUM_WORKERS", -1,
        Number(whole=True, low=0, high=1024, extra={"auto": -1}),
        "threads that decode images; auto (-1): depends on the number of cores"),
    Key("DATALOADER.NUM_INSTANCE", 4, Number(whole=True, low=2, high=1024),
        "images of each identity in a batch"),
    Key("CACHE.MODE", "auto", OneOf(("auto", "device", "memory", "stream")),
        "where decoded images are kept; stream keeps none"),
    Key("CACHE.LIMIT_MIB", -1,
        Number(whole=True, low=0, high=10**9, extra={"auto": -1}),
        "largest memory (MiB) for them; auto (-1): a quarter of the free memory of a GPU, half of "
        "the free memory of the host"),
    Key("CACHE.SKIP_BAD", False, Flag(), "leave out unreadable images instead of stopping"),
    # ---- training
    Key("SOLVER.MAX_EPOCHS", 120, _COUNT, "epochs, counted from 1"),
    Key("SOLVER.BASE_LR", 3.5e-4, _POSITIVE, "learning rate of Adam after the warm-up"),
    Key("SOLVER.WEIGHT_DECAY", 5e-4, _WEIGHT, "L2 penalty"),
    Key("SOLVER.MARGIN", 0.3, _WEIGHT, "margin of the batch-hard triplet loss"),
    Key("SOLVER.CENTER_LR", 0.5, _WEIGHT, "learning rate of the centres"),
    Key("SOLVER.CENTER_LOSS_WEIGHT", 5e-4, _POSITIVE, "weight of the centre loss"),
    Key("SOLVER.STEPS", (40, 80), Sequence(_COUNT),
        "epochs from which the rate is multiplied by GAMMA"),
    Key("SOLVER.GAMMA", 0.1, Number(low=0, high=1, above=True), "factor of the rate at each step"),
    Key("SOLVER.WARMUP_FACTOR", 0.01, _PROBABILITY, "factor at the start of the warm-up"),
    Key("SOLVER.WARMUP_ITERS", 10, Number(whole=True, low=0, high=10**9), "epochs of warm-up"),
    Key("SOLVER.WARMUP_METHOD", "linear", OneOf(("linear", "constant")), "shape of the warm-up"),
    Key("SOLVER.IMS_PER_BATCH", 80, _BATCH, "images in a training batch"),
    Key("SOLVER.GRAD_CHECKPOINT", False, Flag(),
        "recompute activations in the backward pass instead of keeping them: the same numbers with "
        "less memory and about a fifth more FLOPs, for small GPUs; not in the re-ID network of a "
        "timm model"),
    Key("SOLVER.VAL_PERIOD", 10, _COUNT, "epochs between validations"),
    Key("SOLVER.CHECKPOINT_PERIOD", 1, _COUNT, "epochs between checkpoints"),
    Key("SOLVER.LOG_PERIOD", 20, _COUNT, "batches between log lines"),
    Key("SOLVER.SEED", 1, Number(whole=True, low=0, high=2**63 - 1), "seed of all random numbers"),
    Key("SOLVER.RESUME", False, Flag(), "resume from the checkpoint in OUTPUT_DIR"),
    # ---- computation
    Key("RUNTIME.PRECISION", "auto", PRECISIONS,
        "number type of the networks; auto: bfloat16 if the hardware multiplies it faster"),
    Key("RUNTIME.CHANNELS_LAST", True, Flag(), "channels-last memory layout"),
    Key("RUNTIME.COMPILE", "auto", OneOf(("auto", "on", "off")),
        "whether torch.compile compiles the networks, in a run of one process; auto: on GPUs, for "
        "trainings on a million images of 256 x 128 or more"),
    Key("RUNTIME.CUDNN_BENCHMARK", False, Flag(),
        "in training on GPUs, cuDNN tries its kernels once and keeps the fastest; rounding may "
        "then differ from run to run"),
    Key("RUNTIME.TRACKERS", ("tensorboard",), Sequence(OneOf(("tensorboard", *TRACKERS))),
        "where the numbers of a training are recorded in addition to metrics.jsonl: TensorBoard, "
        "Weights & Biases, MLflow; '' for none"),
    Key("RUNTIME.THREADS", 0, Number(whole=True, low=0, high=4096),
        "CPU threads; 0: torch's choice"),
    # ---- evaluation
    Key("TEST.IMS_PER_BATCH", 256, _BATCH, "images in an evaluation batch"),
    Key("TEST.RE_RANKING", "off", OnOff(),
        "k-reciprocal re-ranking in addition to the plain scores"),
    Key("TEST.EVALUATE_ONLY", "off", OnOff(), "evaluate a checkpoint without training"),
    Key("TEST.RETRIEVE_WITH_KEY", "on", OnOff(),
        "whether re-ID is computed on decrypted protected images; off: on encrypted ones"),
    Key("TEST.RECOVERY_WITH_KEY", "on", OnOff(),
        "whether recovery is computed from decrypted anonymized images; off: from encrypted ones"),
    Key("TEST.CROSS_CAMERA", True, Flag(),
        "ignore gallery images of the query's identity and camera; False for single-camera sets"),
    Key("EVAL.SPLIT", "test", OneOf(("test", "val")), "split that TEST.EVALUATE_ONLY evaluates"),
    Key("EVAL.DETAILS", "off", OnOff(),
        "also write intervals, verification rates, single-shot scores and per-query results"),
    Key("EVAL.REPORT", "on", OnOff(), "write report.html, one page about the run"),
    Key("EVAL.IMAGES", "on", OnOff(),
        "write images of the data set to OUTPUT_DIR: pictures.png, pictures/, strips.png, "
        "ranks_*.png, TensorBoard and the batch of a loss that is not finite; report.html embeds "
        "those of synthetic people only"),
    Key("ISED.SCHEME", "additive", CIPHERS,
        "encryption of anonymized images; additive is the published scheme and is not secure"),
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
