"""A model: networks on their device with their precision, built from a configuration or weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from yacs.config import CfgNode

from engine.checkpoint import CheckpointError, LoadedWeights, find_weights, load_networks
from engine.distributed.processes import device_of_rank, world
from engine.train_step import Autocast
from layers.pixels import PixelSpace
from modeling.build import build_networks, memory_format_of
from modeling.privacy_networks import Networks
from modeling.weights import num_classes_of
from utils.config_tree import changed_values, get_value, set_value
from utils.device import compile_in_place, precision_name, resolve_compile, resolve_precision
from utils.errors import naming_keys
from utils.logger import get_logger
from utils.seeding import seed_everything

_LOGGER = get_logger()

# Letters of the networks that evaluation needs, by MODEL.MODE.
NEEDED = {"GCR": ("G", "G_R", "C"), "C": ("C",)}

# Pixels of a training above which compiling saves time: a million images of the published size. On
# a large GPU each image gains some tenth of a millisecond, and compiling takes about two minutes
# (docs/PERFORMANCE.md). A resume counts the whole training, so that its arithmetic does not change.
_WORTH_COMPILING = 1_000_000 * 256 * 128

# Keys that the meaning of weights depends on. Native checkpoints record their values; these are
# the values of the published official files, which do not record them.
PUBLISHED_ARCHITECTURE: Mapping[str, Any] = {
    "MODEL.MODE": "GCR",
    "MODEL.NAME": "resnet50_nl",
    "MODEL.LAST_STRIDE": 1,
    "MODEL.STEM_RELU": False,
    "MODEL.NGF": 64,
    "MODEL.NDF": 64,
    "UNET.NUM_DOWNS": 7,
    "INPUT.IMG_SIZE": (256, 128),
    "INPUT.PIXEL_MEAN": (0.485, 0.456, 0.406),
    "INPUT.PIXEL_STD": (0.5, 0.5, 0.5),
}


# Keys that the re-ID network does not depend on.
_NOT_OF_REID = {"MODEL.NGF", "MODEL.NDF", "UNET.NUM_DOWNS"}
# Keys that the shapes of weights depend on, for messages.
SHAPE_KEYS = ("MODEL.NAME", "MODEL.NGF", "MODEL.NDF", "UNET.NUM_DOWNS")


@dataclass(frozen=True)
class Model:
    """Networks on their device, and what is needed to run them."""

    nets: Networks  # the networks
    device: torch.device  # their device
    precision: torch.dtype  # type of their arithmetic, float32 or bfloat16
    pixels: PixelSpace  # pixel space of their images
    # memory format of their convolutions; images in the same one are fastest
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def autocast(self) -> Autocast:
        """A function that returns the context in which the networks run."""
        return lambda: _autocast(self.device, self.precision)


def build_model(cfg: CfgNode, num_classes: int) -> Model:
    """Build networks with start values drawn from SOLVER.SEED, on their device."""
    return _model_on_device(cfg, lambda: build_networks(cfg, num_classes))


def pretrained_model(cfg: CfgNode, weights: LoadedWeights) -> Model:
    """Build the networks of a checkpoint, on their device, and load its weights."""
    with naming_keys(*SHAPE_KEYS):
        return _model_on_device(cfg, lambda: networks_of(weights, cfg))


def networks_of(weights: LoadedWeights, cfg: CfgNode | None = None) -> Networks:
    """Build the networks of a checkpoint on the CPU, and load its weights.

    With the configuration of a training or evaluation, networks without weights get start values.
    Without one, the checkpoint's architecture is built; no start value is drawn, which takes as
    long as reading the weights.

    Raises:
        UserError: The weights do not fit the networks.
    """
    num_classes = num_classes_of(weights.networks["C"], weights.source)
    with _NoStartValues() if cfg is None else contextlib.nullcontext():
        cfg = recorded_config(weights) if cfg is None else cfg
        nets = build_networks(cfg, num_classes)
    load_networks({x: nets.official_networks[x] for x in NEEDED[cfg.MODEL.MODE]}, weights)
    return nets


class _NoStartValues(TorchFunctionMode):
    """Leaves new weights uninitialised where random values would be drawn."""

    _DRAWS = frozenset(
        (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_,
         Tensor.normal_)
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Call a function of torch, unless it draws."""
        kwargs = kwargs or {}
        if func in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def recorded_config(weights: LoadedWeights) -> CfgNode:
    """Return the configuration that builds the networks of a checkpoint: what the file records.

    Only the keys that ``build_networks`` and ``PixelSpace`` need are in it.
    """
    values = dict(PUBLISHED_ARCHITECTURE)
    for name, value in weights.info.get("architecture", {}).items():
        if name in values:
            values[name] = _recorded_value(name, value, weights.source)
    values |= {
        "MODEL.MODE": "GCR" if {"G", "G_R"} <= set(weights.networks) else "C",
        "MODEL.PRETRAIN_CHOICE": "self",
        "MODEL.OUTPUT_MODE": "both",
        "SOLVER.GRAD_CHECKPOINT": False,
        "RUNTIME.CHANNELS_LAST": True,
    }
    cfg = CfgNode()
    for name, value in values.items():
        set_value(cfg, name, value)
    return cfg


def _recorded_value(name: str, value: object, source: str) -> object:
    """Return a value of the recorded architecture."""
    published = PUBLISHED_ARCHITECTURE[name]
    if isinstance(published, tuple):
        kinds = (int,) if isinstance(published[0], int) else (int, float)
        is_valid = (
            isinstance(value, list | tuple)
            and len(value) == len(published)
            and all(type(item) in kinds for item in value)
        )
    else:
        is_valid = type(value) is type(published)
    if not is_valid:
        text = repr(value)[:80]
        raise CheckpointError(f"{source} records {name} {text}; expected such as {published!r}")
    return tuple(value) if isinstance(value, list) else value


def _model_on_device(cfg: CfgNode, build: Callable[[], Networks]) -> Model:
    with naming_keys("MODEL.DEVICE", "MODEL.DEVICE_ID"):
        device = device_of_rank(cfg.MODEL.DEVICE, cfg.MODEL.DEVICE_ID)
    if device.type == "cuda":  # streams, events and pinned memory belong to the current GPU
        torch.cuda.set_device(device)
    seed_everything(cfg.SOLVER.SEED)
    nets = build().to(device)
    precision = resolve_precision(cfg.RUNTIME.PRECISION, device)
    # By default cuDNN rounds float32 inputs to TF32 (10 bits); float32 is the reference here.
    torch.backends.cudnn.allow_tf32 = precision != torch.float32
    _LOGGER.info("Computing on %s in %s", device, precision_name(precision))
    pixels = PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
    return Model(nets, device, precision, pixels, memory_format_of(cfg))


def compile_model(cfg: CfgNode, model: Model, num_images: float = math.inf) -> None:
    """Compile the networks of a training step if RUNTIME.COMPILE asks for it.

    In the re-ID network's head only the pooling works on feature maps; the rest is small and is not
    compiled. Nothing is compiled with SOLVER.GRAD_CHECKPOINT, nor in a distributed run: there
    every batch norm communicates, which would end a graph, so nothing is left to fuse.

    ``num_images`` counts the images of the whole training, once per epoch.
    """
    if cfg.SOLVER.GRAD_CHECKPOINT:
        return
    if world().size > 1:
        if cfg.RUNTIME.COMPILE == "on":
            _LOGGER.info(
                "Networks are not compiled (RUNTIME.COMPILE on): in a run of several processes "
                "every batch norm communicates, which leaves nothing to fuse"
            )
        return
    worth = num_images * math.prod(cfg.INPUT.IMG_SIZE) >= _WORTH_COMPILING
    if not resolve_compile(cfg.RUNTIME.COMPILE, model.device, worth_it=worth):
        return
    reid = model.nets.reid
    others = [network for network in model.nets.official_networks.values() if network is not reid]
    # With auto, fall back to eager mode if compilation fails.
    forgiving = cfg.RUNTIME.COMPILE == "auto"
    compile_in_place([*others, reid.base, reid.global_pool], forgiving=forgiving)
    _LOGGER.info("The first steps take minutes longer: they compile the networks (RUNTIME.COMPILE)")


def load_pretrained(cfg: CfgNode, *, as_start: bool = False) -> LoadedWeights:
    """Read the weights in MODEL.PRETRAIN_DIR: the best ones, or else the latest.

    If a training starts from them (``as_start``), they may be of a re-ID network alone.

    Raises:
        UserError: The weights are missing or damaged, or have another architecture than the
            configuration.
    """
    with naming_keys("MODEL.PRETRAIN_DIR", "MODEL.MODE"):
        folder, needed = Path(cfg.MODEL.PRETRAIN_DIR), NEEDED[cfg.MODEL.MODE]
        weights = find_weights(folder, needed, or_only_reid=as_start)
    # A checkpoint of the joint model contains the baseline's network, so modes may differ.
    differ = {"MODEL.MODE"}
    if set(weights.networks) == {"C"}:
        differ |= _NOT_OF_REID
    recorded = {k: v for k, v in weights.info.get("architecture", {}).items() if k not in differ}
    differing = changed_values(recorded, architecture(cfg))
    if differing:
        raise CheckpointError(
            f"{weights.source} was trained with {', '.join(differing)}; give the same values to "
            "use it"
        )
    return weights


def architecture(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys that the meaning of weights depends on, as plain values."""
    values = {name: get_value(cfg, name) for name in PUBLISHED_ARCHITECTURE}
    return {k: list(v) if isinstance(v, list | tuple) else v for k, v in values.items()}


def model_info(cfg: CfgNode, label_of: dict[int, int]) -> dict[str, Any]:
    """Return what a native checkpoint records in addition to weights, to use the networks."""
    return {
        "architecture": architecture(cfg),
        "channel_order": "RGB",
        "resize": "Pillow bilinear on 8-bit images",
        "metric": "cosine distance on the feature after the BNNeck",
        "dataset": cfg.DATASETS.NAMES,
        "desensitizer": {"type": cfg.INPUT.TYPE, "radius": cfg.INPUT.RADIUS},
        "pid_of_label": pids_by_label(label_of),
    }


def pids_by_label(label_of: Mapping[int, int]) -> list[int]:
    """Return the pid of each class."""
    return sorted(label_of, key=lambda pid: label_of[pid])


def _autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)
