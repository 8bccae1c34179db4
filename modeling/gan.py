"""Networks with adversarial losses: U-Net (anonymizer, recovery) and PatchGAN (discriminators)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from layers.blocks import Recomputable
from utils.device import full_precision
from utils.errors import UserError
from utils.memory import NUM_DOWNS

DEVIATION = 0.02  # standard deviation of start weights


def initialize_gan_weights(network: nn.Module) -> None:
    """Draw convolutions from N(0, .02) and batch-norm weights from N(1, .02); set biases to 0.

    Source: P. Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks",
    CVPR 2017. Numbers are drawn from torch's global CPU generator, in the order of ``modules()``.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, DEVIATION)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, DEVIATION)
            nn.init.zeros_(module.bias)


LEAK = 0.2  # negative slope of leaky ReLUs


def _down(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=False)


def _up(inputs: int, outputs: int, *, bias: bool = False) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)


class _Join(torch.autograd.Function):
    """Concatenation along channels with dense gradients.

    The gradients of ``torch.cat`` are slices whose pixels are not adjacent in memory. On a CPU
    batch norm takes thirty times as long for such a gradient (torch 2.14), 5 % of a step.
    """

    @staticmethod
    def forward(ctx: Any, skip: Tensor, below: Tensor) -> Tensor:
        ctx.channels = skip.shape[1]
        return torch.cat((skip, below), dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        # `below` is the output of a batch norm; the gradient of the skip is only added to another.
        return gradient[:, : ctx.channels], gradient[:, ctx.channels :].clone()


def _join(skip: Tensor, below: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # a traced network can be saved
        return torch.cat((skip, below), dim=1)
    return cast("Tensor", _Join.apply(skip, below))


# The blocks of a U-Net have ``channels`` features after their down-convolution. The output of the
# block below, ``inner``, has twice as many.
#
# Activations work in place, which changes the input that a block concatenates with its output. This
# has no effect: the next layer is a ReLU, and relu(leaky_relu(x)) = relu(x).


class OutermostBlock(nn.Module):
    """First and last layer of a U-Net: image -> features -> ... -> image before the tanh."""

    def __init__(self, image_channels: int, channels: int, inner: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(
            _down(image_channels, channels),
            inner,
            nn.ReLU(inplace=True),
            _up(2 * channels, image_channels, bias=True),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, image_channels, H, W) to the same shape, unbounded."""
        return cast("Tensor", self.model(image))


class MiddleBlock(nn.Module):
    """A middle level, with batch norm after both convolutions."""

    def __init__(self, outer: int, channels: int, inner: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.LeakyReLU(LEAK, inplace=True),
            _down(outer, channels),
            nn.BatchNorm2d(channels),
            inner,
            nn.ReLU(inplace=True),
            _up(2 * channels, outer),
            nn.BatchNorm2d(outer),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, outer, H, W) to (B, 2 outer, H, W): the input, then the output of the block."""
        return _join(features, self.model(features))


class InnermostBlock(nn.Module):
    """The innermost level: no batch norm after its down-convolution."""

    def __init__(self, outer: int, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.LeakyReLU(LEAK, inplace=True),
            _down(outer, channels),
            nn.ReLU(inplace=True),
            _up(channels, outer),
            nn.BatchNorm2d(outer),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, outer, H, W) to (B, 2 outer, H, W): the input, then the output of the block."""
        if features.device.type != "cpu":
            return _join(features, self.model(features))
        # If a side of the output is one pixel, oneDNN's bfloat16 convolutions read uninitialised
        # memory (torch 2.15: sometimes NaN). These maps are so small that float32 costs no time.
        with full_precision(features):
            below = self.model(features.float())
        return _join(features, below.to(features.dtype))


class UNet(nn.Module, Recomputable):
    """Image-to-image network with skip connections, 256 x 128 pixels and 7 levels by default.

    Width doubles from ``width`` to 8 ``width`` over the first levels, then stays constant.
    State-dict keys are those of published ``unet_128`` checkpoints.

    Source: P. Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks",
    CVPR 2017.

    Args:
        num_downs: Number of halvings, at least 5; height and width must be divisible by
            2^num_downs.
        width: Channels after the first down-convolution (NGF).
    """

    def __init__(self, num_downs: int = 7, width: int = 64) -> None:
        super().__init__()
        assert num_downs >= NUM_DOWNS[0]
        self.num_downs = num_downs
        block: nn.Module = InnermostBlock(8 * width, 8 * width)
        for _ in range(num_downs - NUM_DOWNS[0]):
            block = MiddleBlock(8 * width, 8 * width, block)
        for factor in (4, 2, 1):
            block = MiddleBlock(factor * width, 2 * factor * width, block)
        self.model = OutermostBlock(3, width, block)
        initialize_gan_weights(self)

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to float32 images of the same shape in [-1, 1].

        Raises:
            UserError: H or W is not divisible by 2^num_downs.
        """
        check_divisible(tuple(image.shape[-2:]), self.num_downs)
        return torch.tanh(self.run_part(self.model, image).float())


def check_divisible(size: tuple[int, ...], num_downs: int) -> None:
    """Raise a UserError unless (height, width) can be halved ``num_downs`` times."""
    step = 2**num_downs
    if any(length < step or length % step for length in size):
        raise UserError(
            f"image size is {tuple(size)} with {num_downs} down-samplings; expected height and "
            f"width divisible by {step}"
        )


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
        """Return logits (B, 1, H/8 - 2, W/8 - 2), high for real images.

        ``image`` has real or generated images, and ``condition`` the normalised images that they
        belong to; both are (B, 3, H, W).
        """
        return cast("Tensor", self.model(torch.cat((condition, image), dim=1)))
