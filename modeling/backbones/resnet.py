"""ResNet feature extractors of the re-ID network, with and without non-local blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as ClassificationResNet

from layers.non_local import NonLocalBlock
from layers.recompute import Recomputable
from utils.errors import UserError


@dataclass(frozen=True)
class ResNetDesign:
    """What tells one backbone from another.

    Attributes:
        architecture: torchvision's name, under which ImageNet weights are found.
        block: Residual block.
        depths: Blocks in each of the four stages.
        non_local: Non-local blocks after the last so many blocks of layer2 and of layer3.
    """

    architecture: str
    block: type[BasicBlock | Bottleneck]
    depths: tuple[int, int, int, int]
    non_local: tuple[int, int] = (0, 0)


class ResNetBackbone(ClassificationResNet, Recomputable):
    """torchvision's ResNet without its head, changed as the AGW family of re-ID networks asks.

    Args:
        design: Depths, blocks, and where non-local blocks go.
        last_stride: Stride of layer4, 1 or 2; 1 keeps twice the resolution.
        stem_relu: Whether a ReLU follows the stem's batch norm. Published AGW checkpoints were
            trained without it.

    Raises:
        UserError: If the stride is neither 1 nor 2.
    """

    def __init__(self, design: ResNetDesign, *, last_stride: int, stem_relu: bool) -> None:
        if last_stride not in (1, 2):
            raise UserError(f"MODEL.LAST_STRIDE is {last_stride}; expected 1 or 2")
        super().__init__(design.block, list(design.depths))
        del self.fc, self.avgpool
        self.architecture = design.architecture
        self.stem_relu = stem_relu
        self.out_channels = 512 * design.block.expansion
        _set_stride(self.layer4[0], last_stride)
        counts, expansion = design.non_local, design.block.expansion
        if any(counts):
            self.NL_2 = nn.ModuleList(NonLocalBlock(128 * expansion) for _ in range(counts[0]))
            self.NL_3 = nn.ModuleList(NonLocalBlock(256 * expansion) for _ in range(counts[1]))
        self.has_non_local = any(counts)

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
        """Run a stage with one non-local block after each of its last ``len(non_local)`` blocks."""
        blocks = list(stage.children())
        first = len(blocks) - len(non_local)
        for index, block in enumerate(blocks):
            features = self.run_part(block, features)
            if index >= first:
                features = self.run_part(non_local[index - first], features)
        return features


def _set_stride(block: nn.Module, stride: int) -> None:
    """Set the stride of a stage's first block: on the 3x3 convolution that bears it, and beside."""
    strided = block.conv2 if isinstance(block, Bottleneck) else block.conv1
    assert isinstance(strided, nn.Conv2d)
    assert isinstance(block.downsample, nn.Sequential)
    projection = block.downsample[0]
    assert isinstance(projection, nn.Conv2d)
    strided.stride = projection.stride = (stride, stride)
