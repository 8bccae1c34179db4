"""ResNet feature extractors of the re-ID network, with and without non-local blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from layers.non_local import NonLocalBlock
from layers.recompute import Recomputable
from modeling.backbones.base import Backbone
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


class ResNetBackbone(Backbone, Recomputable):
    """torchvision's ResNet without its head, with the changes of AGW.

    Args:
        depths: Blocks in each of the four stages.
        bottleneck: Whether a block has three convolutions (ResNet-50 and deeper) instead of two.
        non_local: Numbers of non-local blocks, after the last blocks of layer2 and of layer3.
        last_stride: Stride of layer4, 1 or 2; 1 keeps twice the resolution.
        stem_relu: Whether a ReLU follows the stem's batch norm. Published AGW checkpoints were
            trained without it.
    """

    # Parts of torchvision's ResNet, with the names that checkpoints contain.
    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        depths: Sequence[int],
        *,
        bottleneck: bool,
        non_local: tuple[int, int] = (0, 0),
        last_stride: int,
        stem_relu: bool,
    ) -> None:
        # Loading torchvision takes seconds, and most commands build no ResNet.
        from torchvision.models import resnet  # noqa: PLC0415

        super().__init__()
        block = resnet.Bottleneck if bottleneck else resnet.BasicBlock
        for name, part in resnet.ResNet(block, list(depths)).named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, part)
        self.stem_relu = stem_relu
        self.out_channels = 512 * block.expansion
        _set_stride(self.layer4[0], last_stride)
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


def _set_stride(block: nn.Module, stride: int) -> None:
    """Set the stride of a stage's first block, in its 3x3 convolution and in its shortcut."""
    strided = block.conv2 if hasattr(block, "conv3") else block.conv1
    assert isinstance(strided, nn.Conv2d)
    assert isinstance(block.downsample, nn.Sequential)
    projection = block.downsample[0]
    assert isinstance(projection, nn.Conv2d)
    strided.stride = projection.stride = (stride, stride)
