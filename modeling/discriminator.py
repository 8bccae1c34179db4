"""PatchGAN: a discriminator of overlapping 70 x 70 patches of a pair of images."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from modeling.unet import initialize_gan_weights

LEAK = 0.2
KERNEL = 4


class PatchDiscriminator(nn.Module):
    """Five 4 x 4 convolutions from a pair of images to a map of logits.

    State-dict keys are those of published ``basic`` PatchGAN checkpoints.

    Source: P. Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks",
    CVPR 2017.

    Args:
        width: Channels after the first convolution (NDF).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(6, width, KERNEL, stride=2, padding=1),
            nn.LeakyReLU(LEAK, inplace=True),
        ]
        # The last of these has stride 1, so that a patch is 70 pixels wide.
        for factor, stride in ((1, 2), (2, 2), (4, 1)):
            inputs, outputs = factor * width, 2 * factor * width
            layers += [
                nn.Conv2d(inputs, outputs, KERNEL, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(LEAK, inplace=True),
            ]
        layers.append(nn.Conv2d(8 * width, 1, KERNEL, stride=1, padding=1))
        self.model = nn.Sequential(*layers)
        initialize_gan_weights(self)

    def forward(self, condition: Tensor, image: Tensor) -> Tensor:
        """Return logits of images, given the images that they were generated from.

        Args:
            condition: Normalised images (B, 3, H, W).
            image: Real or generated images that belong to them (B, 3, H, W).

        Returns:
            Logits (B, 1, H/8 - 2, W/8 - 2), high for real images.
        """
        return cast("Tensor", self.model(torch.cat((condition, image), dim=1)))
