"""Rules between keys; the allowed values of single keys are in ``defaults.py``.

Each check yields a sentence for each problem. The checks run on a tree whose single values are
valid, so that all problems are reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from yacs.config import CfgNode

from configs.defaults import DESENSITIZERS
from utils.config_tree import get_value
from utils.errors import UserError

_PAIR_TERMS = ("LOSS.ALIGNMENT", "LOSS.CONSISTENCY", "LOSS.CROSS_TRIPLET")
_LARGEST_NOISE = 10.0  # ten times the range; a larger value is a tile size or blur radius


class ConfigError(UserError):
    """The configuration is not valid; ``problems`` has one sentence for each reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        many = f"{len(self.problems)} problems in the configuration:"
        text = self.problems[0] if len(self.problems) == 1 else "\n  ".join((many, *self.problems))
        super().__init__(text)


def cross_field_problems(cfg: CfgNode, failed: Collection[str] = ()) -> list[str]:
    """Return one sentence for every rule between keys that is broken.

    Checks that need one of the ``failed`` keys, whose values are not allowed, are skipped.
    """
    return [
        problem
        for needs, check in _CHECKS
        if not set(needs) & set(failed)
        for problem in check(cfg)
    ]


def _image_size(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.MODE != "GCR":
        return  # the re-ID network accepts any size
    # The innermost layer needs at least one pixel, and skip connections need equal sizes. With five
    # halvings the image also has the 32 px that the PatchGAN needs.
    step = 2**cfg.UNET.NUM_DOWNS
    for side, pixels in zip(("height", "width"), cfg.INPUT.IMG_SIZE, strict=True):
        if pixels % step:
            near = sorted({max(step, pixels // step * step), -(-pixels // step) * step})
            yield (
                f"INPUT.IMG_SIZE has {side} {pixels}; expected a multiple of {step} "
                f"(2 ** UNET.NUM_DOWNS {cfg.UNET.NUM_DOWNS}), such as "
                f"{' or '.join(map(str, near))}, or a smaller UNET.NUM_DOWNS"
            )


def _padding(cfg: CfgNode) -> Iterator[str]:
    if min(cfg.INPUT.IMG_SIZE) <= cfg.INPUT.PADDING:
        yield (
            f"INPUT.PADDING is {cfg.INPUT.PADDING}; expected less than the image's shorter side "
            f"({min(cfg.INPUT.IMG_SIZE)} px), otherwise a crop could miss the image"
        )


def _radius(cfg: CfgNode) -> Iterator[str]:
    try:
        DESENSITIZERS.registry[cfg.INPUT.TYPE](cfg.INPUT.RADIUS)  # each method checks its own range
    except UserError as error:
        yield f"{error} (INPUT.RADIUS)"
    if cfg.INPUT.TYPE == "noise" and cfg.INPUT.RADIUS > _LARGEST_NOISE:
        yield (
            f"INPUT.RADIUS is {cfg.INPUT.RADIUS:g} with INPUT.TYPE noise; expected a standard "
            f"deviation on values in [0, 1], at most {_LARGEST_NOISE:g}, such as 0.5"
        )


def _batch(cfg: CfgNode) -> Iterator[str]:
    batch, instances = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
    if batch % instances or batch < 2 * instances:
        near = max(2, round(batch / instances)) * instances
        yield (
            f"SOLVER.IMS_PER_BATCH is {batch}; expected a multiple of DATALOADER.NUM_INSTANCE "
            f"{instances} with at least 2 identities, such as {near}"
        )


def _steps(cfg: CfgNode) -> Iterator[str]:
    steps = cfg.SOLVER.STEPS
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        yield f"SOLVER.STEPS is {list(steps)}; expected epochs in increasing order, each once"


def _pretraining(cfg: CfgNode) -> Iterator[str]:
    own = cfg.MODEL.PRETRAIN_CHOICE == "self"
    if own and not cfg.MODEL.PRETRAIN_DIR:
        yield (
            "MODEL.PRETRAIN_CHOICE is self and MODEL.PRETRAIN_DIR is ''; expected the folder of "
            "the checkpoint"
        )
    if cfg.MODEL.PRETRAIN_DIR and not own:
        yield (
            f"MODEL.PRETRAIN_DIR is {cfg.MODEL.PRETRAIN_DIR!r} and would not be read; expected "
            f"MODEL.PRETRAIN_CHOICE self with it, not {cfg.MODEL.PRETRAIN_CHOICE}"
        )


def _evaluation(cfg: CfgNode) -> Iterator[str]:
    if cfg.TEST.EVALUATE_ONLY == "on" and not (
        cfg.MODEL.PRETRAIN_CHOICE == "self" or cfg.SOLVER.RESUME
    ):
        yield (
            "TEST.EVALUATE_ONLY is on without a checkpoint; expected MODEL.PRETRAIN_CHOICE self "
            "with MODEL.PRETRAIN_DIR, or SOLVER.RESUME True for the one in OUTPUT_DIR"
        )


def _device(cfg: CfgNode) -> Iterator[str]:
    device, number = cfg.MODEL.DEVICE, int(cfg.MODEL.DEVICE_ID)
    if ":" in device and number not in (0, int(device.split(":")[1])):
        yield (
            f"MODEL.DEVICE is {device} and MODEL.DEVICE_ID is {number}; expected one of the two "
            "to name the GPU"
        )


def _compiling(cfg: CfgNode) -> Iterator[str]:
    if cfg.SOLVER.GRAD_CHECKPOINT and cfg.RUNTIME.COMPILE == "on":
        yield (
            "RUNTIME.COMPILE is on with SOLVER.GRAD_CHECKPOINT True; expected one of the "
            "two: compiled networks would update their running statistics twice"
        )


def _normalisation(cfg: CfgNode) -> Iterator[str]:
    if cfg.LOSS.TRIPLET_NORMALIZED and cfg.MODEL.WEIGHT_REGULARIZED_TRIPLET == "off":
        yield (
            "LOSS.TRIPLET_NORMALIZED is True with MODEL.WEIGHT_REGULARIZED_TRIPLET off; expected "
            "on: the batch-hard loss has no normalised form"
        )


def _output_mode(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.OUTPUT_MODE != "none":
        return
    if cfg.MODEL.MODE == "C":
        yield (
            "MODEL.OUTPUT_MODE is none with MODEL.MODE C, which trains no network; expected "
            "GCR, or another MODEL.OUTPUT_MODE"
        )
    if str(cfg.MODEL.VAL_R1) != "inf":
        yield (
            f"MODEL.VAL_R1 is {cfg.MODEL.VAL_R1} with MODEL.OUTPUT_MODE none; expected inf, since "
            "the re-ID network that upgradation is decided by is not trained"
        )


def _pair_terms(cfg: CfgNode) -> Iterator[str]:
    mode = cfg.MODEL.OUTPUT_MODE
    for name in _PAIR_TERMS:
        weight = get_value(cfg, name)
        if weight and mode not in ("both", "joined"):
            yield (
                f"{name} is {weight:g} with MODEL.OUTPUT_MODE {mode}; expected both or joined, "
                "since the loss compares raw and protected images"
            )


_CHECKS: tuple[tuple[tuple[str, ...], Callable[[CfgNode], Iterator[str]]], ...] = (
    (("MODEL.MODE", "UNET.NUM_DOWNS", "INPUT.IMG_SIZE"), _image_size),
    (("INPUT.PADDING", "INPUT.IMG_SIZE"), _padding),
    (("INPUT.TYPE", "INPUT.RADIUS"), _radius),
    (("SOLVER.IMS_PER_BATCH", "DATALOADER.NUM_INSTANCE"), _batch),
    (("SOLVER.STEPS",), _steps),
    (("MODEL.PRETRAIN_CHOICE", "MODEL.PRETRAIN_DIR"), _pretraining),
    (("TEST.EVALUATE_ONLY", "MODEL.PRETRAIN_CHOICE", "SOLVER.RESUME"), _evaluation),
    (("MODEL.DEVICE", "MODEL.DEVICE_ID"), _device),
    (("SOLVER.GRAD_CHECKPOINT", "RUNTIME.COMPILE"), _compiling),
    (("LOSS.TRIPLET_NORMALIZED", "MODEL.WEIGHT_REGULARIZED_TRIPLET"), _normalisation),
    (("MODEL.OUTPUT_MODE", "MODEL.MODE", "MODEL.VAL_R1"), _output_mode),
    ((*_PAIR_TERMS, "MODEL.OUTPUT_MODE"), _pair_terms),
)
