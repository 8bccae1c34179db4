"""Names of the re-ID networks and what each is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from layers.blocks import AveragePooling, Backbone, GeneralizedMeanPooling
from layers.pixels import PixelSpace
from modeling.backbones.resnet import (
    RESNET18_WEIGHTS,
    RESNET50_WEIGHTS,
    RESNET101_WEIGHTS,
    ResNetBackbone,
)
from modeling.backbones.timm_backbone import PREFIX, TimmBackbone
from modeling.weights import ImageNetWeights
from utils.errors import UserError


@dataclass(frozen=True)
class ReIDDesign:
    """A backbone with its pooling and weights."""

    # Class of the backbone, or a function that builds it with random weights. The keywords
    # ``last_stride`` (1 by default) and ``stem_relu`` (False by default) are passed. A UserError is
    # raised if the backbone has no such part and the value is not the default.
    backbone: Callable[..., Backbone]
    # turns its map (B, C, H', W') into features (B, C); None for generalised-mean pooling, or
    # average pooling if the features are signed
    pooling: Callable[[], nn.Module] | None
    imagenet: ImageNetWeights | None = None  # its ImageNet weights; None if it has none


_RESNET18 = partial(ResNetBackbone, (2, 2, 2, 2), bottleneck=False)
_RESNET50 = partial(ResNetBackbone, (3, 4, 6, 3), bottleneck=True)
_RESNET101 = partial(ResNetBackbone, (3, 4, 23, 3), bottleneck=True)

# A backbone is added with one file and one line.
REID_DESIGNS: dict[str, ReIDDesign] = {
    "resnet18": ReIDDesign(_RESNET18, AveragePooling, RESNET18_WEIGHTS),
    "resnet50": ReIDDesign(_RESNET50, AveragePooling, RESNET50_WEIGHTS),
    "resnet101": ReIDDesign(_RESNET101, AveragePooling, RESNET101_WEIGHTS),
    # layer3 of a ResNet-18 has only two blocks to follow
    "resnet18_nl": ReIDDesign(
        partial(_RESNET18, non_local=(2, 2)), GeneralizedMeanPooling, RESNET18_WEIGHTS
    ),
    "resnet50_nl": ReIDDesign(
        partial(_RESNET50, non_local=(2, 3)), GeneralizedMeanPooling, RESNET50_WEIGHTS
    ),
}


def reid_design(name: str, image_size: tuple[int, int], pixels: PixelSpace) -> ReIDDesign:
    """Return the design of a MODEL.NAME: a key of ``REID_DESIGNS``, or ``timm:<name>``.

    Only timm models depend on the size (height and width) and the pixel space of the images.

    Raises:
        UserError: If the name is unknown.
    """
    if name.startswith(PREFIX):
        model = name.removeprefix(PREFIX)
        make = partial(TimmBackbone, model, image_size=image_size, pixels=pixels)
        return ReIDDesign(make, pooling=None)
    if name not in REID_DESIGNS:
        raise UserError(
            f"MODEL.NAME is {name!r}; expected one of {', '.join(sorted(REID_DESIGNS))}, or "
            f"{PREFIX}<name>"
        )
    return REID_DESIGNS[name]


def imagenet_weights(name: str) -> ImageNetWeights:
    """Return which ImageNet weights the backbone of a MODEL.NAME starts from.

    Raises:
        UserError: If it has none.
    """
    weights = REID_DESIGNS[name].imagenet
    if weights is None:
        others = (other for other, design in REID_DESIGNS.items() if design.imagenet is not None)
        raise UserError(
            f"MODEL.PRETRAIN_CHOICE is imagenet with MODEL.NAME {name}, for which there are no "
            f"ImageNet weights; expected MODEL.NAME one of {', '.join(sorted(others))}, or random "
            "weights with MODEL.PRETRAIN_CHOICE none"
        )
    return weights
