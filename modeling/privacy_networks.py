"""All networks of a method as one module: five for the joint model, one for the baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modeling.gan import PatchDiscriminator, UNet
from modeling.reid_network import PrivacyOutput, ReIDNetwork, ReIDOutput, ReIDPair


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Compute gradients of the modules' inputs but not of their parameters.

    This saves half of their backward pass, and a generator's step leaves no gradients in a
    discriminator. The backward pass may run after the context, since the forward pass determines
    what needs a gradient. Parameters that were frozen before stay frozen.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


# Output mode -> whether the re-ID loss is computed on (raw, protected) images.
OUTPUT_MODES = {
    "both": (True, True),
    "origin": (True, False),
    "protected": (False, True),
    "joined": (True, True),
    "none": (False, False),
}


def _reid_pair(
    reid: ReIDNetwork, raw: Tensor, protected: Tensor, output_mode: str
) -> tuple[ReIDOutput | None, ReIDOutput | None]:
    """Run the re-ID network on the images of the re-ID loss, raw and protected.

    As published, each kind is a separate batch. Batch norm then normalises each kind by its own
    statistics in training, and by the running mean of both in evaluation. The mode ``joined`` makes
    one batch of both, so that training and evaluation agree.
    """
    on_raw, on_protected = OUTPUT_MODES[output_mode]
    if output_mode == "joined":
        output = reid(torch.cat((raw, protected)))
        parts = zip(*(value.chunk(2) for value in vars(output).values()), strict=True)
        of_raw, of_protected = (ReIDOutput(*part) for part in parts)
        return of_raw, of_protected
    return reid(raw) if on_raw else None, reid(protected) if on_protected else None


class PrivacyNetworks(nn.Module):
    """Anonymizer, recovery network, re-ID network and two discriminators (mode GCR).

    ``output_mode`` chooses the images of the re-ID loss, a key of ``OUTPUT_MODES``.
    """

    def __init__(
        self,
        anonymizer: UNet,
        recovery: UNet,
        reid: ReIDNetwork,
        discriminator_anonymized: PatchDiscriminator,
        discriminator_recovered: PatchDiscriminator,
        *,
        output_mode: str = "both",
    ) -> None:
        super().__init__()
        self._output_mode = output_mode
        self.anonymizer = anonymizer  # raw -> anonymized (G)
        self.recovery = recovery  # anonymized -> recovered (G_R)
        self.reid = reid  # raw, anonymized or recovered -> identity (C)
        if not any(OUTPUT_MODES[output_mode]):
            # DistributedDataParallel expects a gradient of each parameter that requires one.
            reid.requires_grad_(requires_grad=False)
        self.discriminator_anonymized = discriminator_anonymized  # of (raw, anonymized) (D1)
        self.discriminator_recovered = discriminator_recovered  # of (anonymized, recovered) (D2)

    @property
    def discriminators(self) -> tuple[PatchDiscriminator, PatchDiscriminator]:
        """Both discriminators: D1, D2."""
        return self.discriminator_anonymized, self.discriminator_recovered

    @property
    def official_networks(self) -> dict[str, nn.Module]:
        """Networks by the letter that names their file in an official checkpoint folder."""
        return {
            "G": self.anonymizer,
            "G_R": self.recovery,
            "C": self.reid,
            "D1": self.discriminator_anonymized,
            "D2": self.discriminator_recovered,
        }

    def forward(self, raw: Tensor, desensitized: Tensor | None = None) -> PrivacyOutput:
        """Run all networks except the discriminators on normalised images (B, 3, H, W).

        Both modes are called with the same arguments; ``desensitized`` is not used here.
        """
        del desensitized
        anonymized = self.anonymizer(raw)
        pair = _reid_pair(self.reid, raw, anonymized, self._output_mode)
        return PrivacyOutput(*pair, anonymized, self.recovery(anonymized))


class ReIDOnly(nn.Module):
    """The re-ID network alone, trained on raw and desensitized images (mode C, the baseline)."""

    def __init__(self, reid: ReIDNetwork, *, output_mode: str = "both") -> None:
        super().__init__()
        self._output_mode = output_mode
        self.reid = reid

    @property
    def discriminators(self) -> tuple[PatchDiscriminator, ...]:
        """Empty: the baseline has no discriminators."""
        return ()

    @property
    def official_networks(self) -> dict[str, nn.Module]:
        """Networks by the letter that names their file in an official checkpoint folder."""
        return {"C": self.reid}

    def forward(self, raw: Tensor, desensitized: Tensor) -> ReIDPair:
        """Run the re-ID network on raw and desensitized images (B, 3, H, W)."""
        return ReIDPair(*_reid_pair(self.reid, raw, desensitized, self._output_mode))


Networks = PrivacyNetworks | ReIDOnly
