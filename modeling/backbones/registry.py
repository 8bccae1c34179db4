"""Names of the re-ID networks and what each is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torchvision.models.resnet import BasicBlock, Bottleneck

from layers.pooling import AveragePooling, GeneralizedMeanPooling
from modeling.backbones.resnet import ResNetDesign
from utils.errors import UserError


@dataclass(frozen=True)
class ReIDDesign:
    """A backbone and the pooling that goes with it."""

    backbone: ResNetDesign
    pooling: type[GeneralizedMeanPooling | AveragePooling]


def _plain(name: str, block: type[BasicBlock | Bottleneck], *depths: int) -> ReIDDesign:
    first, second, third, fourth = depths
    return ReIDDesign(ResNetDesign(name, block, (first, second, third, fourth)), AveragePooling)


REID_DESIGNS: dict[str, ReIDDesign] = {
    "resnet18": _plain("resnet18", BasicBlock, 2, 2, 2, 2),
    "resnet50": _plain("resnet50", Bottleneck, 3, 4, 6, 3),
    "resnet101": _plain("resnet101", Bottleneck, 3, 4, 23, 3),
    # layer3 of a ResNet-18 has only two blocks to follow
    "resnet18_nl": ReIDDesign(
        ResNetDesign("resnet18", BasicBlock, (2, 2, 2, 2), non_local=(2, 2)),
        GeneralizedMeanPooling,
    ),
    "resnet50_nl": ReIDDesign(
        ResNetDesign("resnet50", Bottleneck, (3, 4, 6, 3), non_local=(2, 3)),
        GeneralizedMeanPooling,
    ),
}


def reid_design(name: str) -> ReIDDesign:
    """Return the design of a MODEL.NAME.

    Raises:
        UserError: If there is none of that name.
    """
    if name not in REID_DESIGNS:
        raise UserError(
            f"MODEL.NAME is {name!r}; expected one of {', '.join(sorted(REID_DESIGNS))}"
        )
    return REID_DESIGNS[name]
