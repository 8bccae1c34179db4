"""The re-ID network (backbone, pooling, BNNeck, classifier) and the outputs of all networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from layers.blocks import AveragePooling, GeneralizedMeanPooling
from layers.pixels import PixelSpace
from modeling.backbones.registry import reid_design
from utils.device import full_precision

# Unweighted losses by name, each a 0-d tensor.
LossDict = dict[str, Tensor]


@dataclass(frozen=True)
class ReIDOutput:
    """Output of the re-ID network for B images; N identities, D features."""

    logits: Tensor  # class scores (B, N)
    feature: Tensor  # pooled feature before the BNNeck (B, D): metric losses use it
    embedding: Tensor  # feature after the BNNeck (B, D): retrieval uses it


@dataclass(frozen=True)
class ReIDPair:
    """Outputs of the re-ID network for a batch of raw images and for their protected versions."""

    reid_raw: ReIDOutput | None  # output for the raw images; None if the output mode excludes them
    # output for the protected images; None if the output mode excludes them
    reid_protected: ReIDOutput | None


@dataclass(frozen=True)
class PrivacyOutput(ReIDPair):
    """Output of the joint model for B raw images of H x W pixels.

    Protected images are the anonymized images.
    """

    anonymized: Tensor  # anonymizer's output (B, 3, H, W) in [-1, 1]
    recovered: Tensor  # recovery network's output for it (B, 3, H, W) in [-1, 1]


CLASSIFIER_DEVIATION = 0.001
PUBLISHED_PIXELS = PixelSpace((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))


class ReIDNetwork(nn.Module):
    """AGW (``resnet50_nl``), smaller variants, and all other registered backbones.

    BNNeck is the batch norm between the feature of the metric losses and that of the classifier.
    Its bias is not trained here and stays 0; a bias from a checkpoint is applied.

    Source: M. Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI
    2021; BNNeck: H. Luo et al., "Bag of Tricks and A Strong Baseline for Deep Person
    Re-identification", CVPR workshops 2019.

    The name is a key of ``REID_DESIGNS``, or ``timm:<name>``. The last stage of the backbone has
    stride 1 or 2. With ``stem_relu``, a ReLU follows the stem's batch norm. Only timm models depend
    on size (height and width, px) and pixel space of the images.

    Raises:
        UserError: The backbone does not support these values.
    """

    def __init__(
        self,
        num_classes: int,
        name: str = "resnet50_nl",
        *,
        last_stride: int = 1,
        stem_relu: bool = False,
        image_size: tuple[int, int] = (256, 128),
        pixels: PixelSpace = PUBLISHED_PIXELS,
    ) -> None:
        super().__init__()
        design = reid_design(name, image_size, pixels)
        self.name = name
        self.num_classes = num_classes
        self.base = design.backbone(last_stride=last_stride, stem_relu=stem_relu)
        self.feature_size = self.base.out_channels
        by_sign = AveragePooling if self.base.signed else GeneralizedMeanPooling
        self.global_pool = (design.pooling or by_sign)()
        self.bottleneck = nn.BatchNorm1d(self.feature_size)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(self.feature_size, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=CLASSIFIER_DEVIATION)

    def forward(self, image: Tensor) -> ReIDOutput:
        """Return logits (B, N), feature and embedding (B, D) of normalised images (B, 3, H, W).

        The head is computed in float32, also under autocast: it is small, and metric losses and
        rankings depend on small differences.
        """
        feature = self.global_pool(self.base(image))
        with full_precision(feature):
            embedding = self.bottleneck(feature)
            logits = self.classifier(embedding)
        return ReIDOutput(logits=logits, feature=feature, embedding=embedding)

    def embed(self, image: Tensor) -> Tensor:
        """Return the embeddings (B, D) of normalised images, float32, for retrieval."""
        feature = self.global_pool(self.base(image))
        with full_precision(feature):
            return cast("Tensor", self.bottleneck(feature))
