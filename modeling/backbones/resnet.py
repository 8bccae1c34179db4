"""ResNet feature extractors of the re-ID network, with and without non-local blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from layers.blocks import Backbone, NonLocalBlock, Recomputable
from modeling.weights import ImageNetWeights, KnownFile


def _weights(architecture: str, *files: KnownFile) -> ImageNetWeights:
    return ImageNetWeights(architecture, files, may_miss=("NL_2.", "NL_3."), may_ignore=("fc.",))


RESNET18_WEIGHTS = _weights(
    "resnet18",
    KnownFile("resnet18-f37072fd.pth", "V1", torchvision="ResNet18_Weights.IMAGENET1K_V1"),
    KnownFile("resnet18-5c106cde.pth", "the old V1 file"),
)
RESNET50_WEIGHTS = _weights(
    "resnet50",
    KnownFile("resnet50-0676ba61.pth", "V1", torchvision="ResNet50_Weights.IMAGENET1K_V1"),
    KnownFile("resnet50-19c8e357.pth", "the old V1 file"),
    KnownFile("resnet50-11ad3fa6.pth", "V2", sought=False),
)
RESNET101_WEIGHTS = _weights(
    "resnet101",
    KnownFile("resnet101-63fe2227.pth", "V1", torchvision="ResNet101_Weights.IMAGENET1K_V1"),
    KnownFile("resnet101-5d3b4d8f.pth", "the old V1 file"),
    KnownFile("resnet101-cd907fc2.pth", "V2", sought=False),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, of ResNet-18; named and ordered as in torchvision."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, width, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.bn2(self.conv2(out))
        out += features if self.downsample is None else self.downsample(features)
        return cast(Tensor, self.relu(out))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, with a shortcut, of ResNet-50 and deeper."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, 4 * width, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(features)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += features if self.downsample is None else self.downsample(features)
        return cast(Tensor, self.relu(out))


class ResNetBackbone(Backbone, Recomputable):
    """A ResNet without its head, with the changes of AGW.

    Names, start values and outputs are those of torchvision's ResNet (tested). torchvision itself
    is not loaded, since it takes as long as torch, which every command would wait for.

    Args:
        depths: Blocks in each of the four stages.
        bottleneck: Whether a block has three convolutions (ResNet-50 and deeper) instead of two.
        non_local: Numbers of non-local blocks, after the last blocks of layer2 and of layer3.
        last_stride: Stride of layer4, 1 or 2; 1 keeps twice the resolution.
        stem_relu: Whether a ReLU follows the stem's batch norm. Published AGW checkpoints were
            trained without it.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        bottleneck: bool,
        non_local: tuple[int, int] = (0, 0),
        last_stride: int,
        stem_relu: bool,
    ) -> None:
        super().__init__()
        block = Bottleneck if bottleneck else BasicBlock
        self.conv1, self.bn1 = _conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _make_stage(block, 64, 64, depths[0], 1)
        self.layer2 = _make_stage(block, 64 * block.expansion, 128, depths[1], 2)
        self.layer3 = _make_stage(block, 128 * block.expansion, 256, depths[2], 2)
        self.layer4 = _make_stage(block, 256 * block.expansion, 512, depths[3], last_stride)
        self.stem_relu = stem_relu
        self.out_channels = 512 * block.expansion
        nn.Linear(self.out_channels, 1000)  # draws random numbers, as torchvision's classifier does
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.has_non_local = any(non_local)
        if self.has_non_local:
            second, third = (width * block.expansion for width in (128, 256))
            self.NL_2 = nn.ModuleList(NonLocalBlock(second) for _ in range(non_local[0]))
            self.NL_3 = nn.ModuleList(NonLocalBlock(third) for _ in range(non_local[1]))

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to (B, out_channels, H/16, W/16); /32 at stride 2."""
        features = self.bn1(self.conv1(image))
        if self.stem_relu:
            features = self.relu(features)
        features = self._stage(self.maxpool(features), self.layer1)
        features = self._stage(features, self.layer2, self.NL_2 if self.has_non_local else ())
        features = self._stage(features, self.layer3, self.NL_3 if self.has_non_local else ())
        return self._stage(features, self.layer4)

    def _stage(
        self, features: Tensor, stage: nn.Module, non_local: nn.ModuleList | tuple[()] = ()
    ) -> Tensor:
        """Run a stage, with one non-local block after each of its last blocks."""
        blocks = list(stage.children())
        plain = len(blocks) - len(non_local)
        for index, block in enumerate(blocks):
            features = self.run_part(block, features)
            if index >= plain:
                features = self.run_part(non_local[index - plain], features)
        return features


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps height and width at stride 1."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _make_stage(
    block: type[BasicBlock | Bottleneck], inputs: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    """Return a stage of blocks, of which the first changes channels and resolution."""
    outputs, shortcut = width * block.expansion, None
    if inputs != outputs:
        shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    blocks = [block(inputs, width, stride, shortcut)]
    blocks += (block(outputs, width, 1, None) for _ in range(1, depth))
    return nn.Sequential(*blocks)
