"""A model as a whole: networks on their device, in their arithmetic, and what describes them."""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from engine.checkpoint import (
    CheckpointError,
    LoadedWeights,
    differences,
    find_weights,
    load_networks,
)
from engine.distributed.group import device_of_rank
from engine.distributed.processes import world
from engine.train_step import Autocast
from layers.pixels import PixelSpace
from modeling.build import build_networks, memory_format_of
from modeling.privacy_networks import Networks
from modeling.weights import num_classes_of
from utils.compiling import compile_in_place, resolve_compile
from utils.config_tree import get_value
from utils.device import precision_name, resolve_precision
from utils.logger import get_logger
from utils.seeding import seed_everything

_LOGGER = get_logger()

# Network letters that evaluation needs, by MODEL.MODE.
NEEDED = {"GCR": ("G", "G_R", "C"), "C": ("C",)}

# Pixels of a training from which compiling pays: a million images of the published size, of which
# each gains some tenth of a millisecond on a large GPU and which compile for some two minutes
# (docs/PERFORMANCE.md). Not what is left after a resume: it must go on in the same arithmetic.
_WORTH_COMPILING = 1_000_000 * 256 * 128

# Keys that have to be those of the training for weights to mean the same.
_ARCHITECTURE = (
    "MODEL.MODE", "MODEL.NAME", "MODEL.LAST_STRIDE", "MODEL.STEM_RELU", "MODEL.NGF", "MODEL.NDF",
    "UNET.NUM_DOWNS", "INPUT.IMG_SIZE", "INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """Networks ready to run.

    Attributes:
        nets: On their device.
        device: Where they are.
        precision: Type of the networks' arithmetic, float32 or bfloat16.
        pixels: Pixel space of their images.
        memory_format: In which their convolutions' weights lie, and images are best given.
    """

    nets: Networks
    device: torch.device
    precision: torch.dtype
    pixels: PixelSpace
    memory_format: torch.memory_format = torch.contiguous_format

    @property
    def autocast(self) -> Autocast:
        """Makes the context that the networks run in."""
        return lambda: _autocast(self.device, self.precision)


def build_model(cfg: CfgNode, num_classes: int) -> Model:
    """Build networks with start values drawn from SOLVER.SEED, and move them to their device."""
    device = device_of_rank(cfg.MODEL.DEVICE, cfg.MODEL.DEVICE_ID)
    if device.type == "cuda":  # streams, events and pinned memory are those of the current GPU
        torch.cuda.set_device(device)
    seed_everything(cfg.SOLVER.SEED)
    nets = build_networks(cfg, num_classes).to(device)
    precision = resolve_precision(cfg.RUNTIME.PRECISION, device)
    # cuDNN rounds float32 inputs to TF32 (10 bits) unless told not to: float32 is the reference.
    torch.backends.cudnn.allow_tf32 = precision != torch.float32
    _LOGGER.info("Computing on %s in %s", device, precision_name(precision))
    pixels = PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
    return Model(nets, device, precision, pixels, memory_format_of(cfg))


def compile_model(cfg: CfgNode, model: Model, num_images: float = math.inf) -> None:
    """Compile what a training step runs, as RUNTIME.COMPILE asks; not with SOLVER.GRAD_CHECKPOINT.

    Of the re-ID network's head only the pooling goes over maps; what follows is small.

    Nor in a run of several processes: there every batch norm talks to the others, so that a graph
    would end at each, with nothing left between two of them that could be fused.

    Args:
        cfg: The configuration.
        model: Its networks are changed in place.
        num_images: Images that the training goes through, repeated ones counted.
    """
    if cfg.SOLVER.GRAD_CHECKPOINT:
        return
    if world().size > 1:
        if cfg.RUNTIME.COMPILE == "on":
            _LOGGER.info(
                "Networks are not compiled (RUNTIME.COMPILE on): in a run of several processes "
                "every batch norm asks the others, which leaves nothing to fuse"
            )
        return
    worth = num_images * math.prod(cfg.INPUT.IMG_SIZE) >= _WORTH_COMPILING
    if not resolve_compile(cfg.RUNTIME.COMPILE, model.device, worth_it=worth):
        return
    reid = model.nets.reid
    others = [one for one in model.nets.official_networks.values() if one is not reid]
    compile_in_place(
        [*others, reid.base, reid.global_pool],
        # Who did not ask for it must not lose a training to a defect of the compiler.
        forgiving=cfg.RUNTIME.COMPILE == "auto",
    )
    _LOGGER.info("The first steps take minutes longer: they compile the networks (RUNTIME.COMPILE)")


def load_pretrained(cfg: CfgNode) -> LoadedWeights:
    """Read the weights of MODEL.PRETRAIN_DIR: the best ones, or else the latest.

    Raises:
        CheckpointError: If they are missing, damaged, or of another architecture than the
            configuration asks for.
    """
    folder = Path(cfg.MODEL.PRETRAIN_DIR)
    weights = find_weights(folder, NEEDED[cfg.MODEL.MODE])
    # A checkpoint of the joint model holds all that the baseline needs: modes may differ.
    recorded = weights.info.get("architecture", {})
    differing = differences(recorded, architecture(cfg), leave_out=("MODEL.MODE",))
    if differing:
        raise CheckpointError(
            f"{weights.source} was trained with {', '.join(differing)}; give the same values to "
            "use it"
        )
    return weights


def pretrained_model(cfg: CfgNode, weights: LoadedWeights) -> Model:
    """Build a model with the number of classes of a checkpoint, and load it."""
    model = build_model(cfg, num_classes_of(weights.networks["C"], weights.source))
    needed = NEEDED[cfg.MODEL.MODE]
    load_networks({x: model.nets.official_networks[x] for x in needed}, weights)
    return model


def architecture(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys that a checkpoint's weights depend on, as plain values."""
    values = {name: get_value(cfg, name) for name in _ARCHITECTURE}
    return {k: list(v) if isinstance(v, list | tuple) else v for k, v in values.items()}


def model_info(cfg: CfgNode, label_of: dict[int, int]) -> dict[str, Any]:
    """Return what a native checkpoint says of its model besides weights.

    Everything a stranger needs to feed it images: architecture, size, pixel space, channel order,
    metric, data set and the pid of each class.
    """
    return {
        "architecture": architecture(cfg),
        "channel_order": "RGB",
        "resize": "Pillow bilinear on 8-bit images",
        "metric": "cosine distance on the feature after the BNNeck",
        "dataset": cfg.DATASETS.NAMES,
        "desensitizer": {"type": cfg.INPUT.TYPE, "radius": cfg.INPUT.RADIUS},
        "pid_of_label": [pid for pid, _ in sorted(label_of.items(), key=lambda item: item[1])],
    }


def _autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)
