"""Start values of the image-to-image networks."""

from __future__ import annotations

from torch import nn

DEVIATION = 0.02  # of convolutions around 0 and of batch-norm weights around 1


def initialize_gan_weights(network: nn.Module) -> None:
    """Draw convolutions from N(0, .02), batch-norm weights from N(1, .02), set biases to 0.

    Source: P. Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks",
    CVPR 2017. Draws come from torch's global CPU generator, in the order of ``modules()``.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, DEVIATION)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, DEVIATION)
            nn.init.zeros_(module.bias)
