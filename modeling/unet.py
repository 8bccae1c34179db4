"""U-Net: the anonymizer and the recovery network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.initialization import initialize_gan_weights
from layers.recompute import Recomputable
from layers.unet_blocks import InnermostBlock, MiddleBlock, OutermostBlock
from utils.errors import UserError

MINIMUM_DOWNS = 5  # width doubles over the first three levels and must have reached its maximum


class UNet(nn.Module, Recomputable):
    """Image-to-image network with skip connections, 256 x 128 pixels and 7 levels by default.

    Width doubles from ``width`` to 8 ``width`` over the first levels and stays there. State-dict
    keys are those of published ``unet_128`` checkpoints.

    Source: P. Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks",
    CVPR 2017.

    Args:
        num_downs: Number of halvings; height and width must be divisible by 2^num_downs.
        width: Channels after the first down-convolution (NGF).

    Raises:
        UserError: If there are fewer than five halvings.
    """

    def __init__(self, num_downs: int = 7, width: int = 64) -> None:
        super().__init__()
        if num_downs < MINIMUM_DOWNS:
            raise UserError(
                f"UNET.NUM_DOWNS is {num_downs}; expected at least {MINIMUM_DOWNS}: raise it, and "
                "INPUT.IMG_SIZE with it where that is not divisible by 2^NUM_DOWNS"
            )
        self.num_downs = num_downs
        block: nn.Module = InnermostBlock(8 * width, 8 * width)
        for _ in range(num_downs - MINIMUM_DOWNS):
            block = MiddleBlock(8 * width, 8 * width, block)
        for factor in (4, 2, 1):
            block = MiddleBlock(factor * width, 2 * factor * width, block)
        self.model = OutermostBlock(3, width, block)
        initialize_gan_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to float32 images of the same shape in [-1, 1].

        Raises:
            UserError: If H or W is not divisible by 2^num_downs.
        """
        check_divisible(tuple(image.shape[-2:]), self.num_downs)
        return torch.tanh(self.run_part(self.model, image).float())


def check_divisible(size: tuple[int, ...], num_downs: int) -> None:
    """Raise UserError unless (height, width) can be halved ``num_downs`` times."""
    step = 2**num_downs
    if any(length < step or length % step for length in size):
        raise UserError(
            f"INPUT.IMG_SIZE is {tuple(size)} with UNET.NUM_DOWNS {num_downs}; expected height and "
            f"width divisible by {step}: change the size or lower UNET.NUM_DOWNS"
        )
