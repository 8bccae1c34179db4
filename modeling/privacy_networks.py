"""Holding networks still while gradients flow through them.

The networks of one method as one module: five for the joint model, one for the baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from modeling.discriminator import PatchDiscriminator
from modeling.reid_network import PrivacyOutput, ReIDNetwork, ReIDOutput, ReIDPair
from modeling.unet import UNet
from utils.errors import UserError


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Take gradients through the modules' inputs but not into their parameters.

    Saves the weights' half of their backward pass, and keeps a generator's step from leaving
    gradients behind in a discriminator. The backward pass may run after the context: what needs a
    gradient is decided in the forward pass. Parameters that were frozen before stay frozen.
    """
    parameters = [
        parameter
        for module in modules
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


OUTPUT_MODES = {  # MODEL.OUTPUT_MODE -> does the re-ID network see (raw, protected) in training?
    "both": (True, True),
    "origin": (True, False),
    "protected": (False, True),
}


def _seen_by_reid(output_mode: str) -> tuple[bool, bool]:
    if output_mode not in OUTPUT_MODES:
        raise UserError(
            f"MODEL.OUTPUT_MODE is {output_mode!r}; expected one of {', '.join(OUTPUT_MODES)}"
        )
    return OUTPUT_MODES[output_mode]


def _reid_pair(
    reid: ReIDNetwork, raw: Tensor, protected: Tensor, seen: tuple[bool, bool]
) -> tuple[ReIDOutput | None, ReIDOutput | None]:
    """Run the re-ID network on each kind by itself, so that each has its own batch statistics."""
    return reid(raw) if seen[0] else None, reid(protected) if seen[1] else None


class PrivacyNetworks(nn.Module):
    """Anonymizer, recovery network, re-ID network and two discriminators (mode GCR).

    Args:
        anonymizer: Raw -> anonymized (G).
        recovery: Anonymized -> recovered (G_R).
        reid: Any of them -> identity (C).
        discriminator_anonymized: Judges (raw, anonymized) pairs (D1).
        discriminator_recovered: Judges (anonymized, recovered) pairs (D2).
        output_mode: Which images the re-ID network sees in training: both, origin or protected.

    Raises:
        UserError: If the output mode is unknown.
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
        self._seen = _seen_by_reid(output_mode)
        self.anonymizer = anonymizer
        self.recovery = recovery
        self.reid = reid
        self.discriminator_anonymized = discriminator_anonymized
        self.discriminator_recovered = discriminator_recovered

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
        """Run everything but the discriminators.

        Args:
            raw: Normalised images (B, 3, H, W).
            desensitized: Not looked at; it is here so that both modes are called alike.

        Returns:
            Images, and re-ID outputs of the kinds that OUTPUT_MODE trains on.
        """
        del desensitized
        anonymized = self.anonymizer(raw)
        reid_raw, reid_protected = _reid_pair(self.reid, raw, anonymized, self._seen)
        return PrivacyOutput(
            reid_raw=reid_raw,
            reid_protected=reid_protected,
            anonymized=anonymized,
            recovered=self.recovery(anonymized),
        )


class ReIDOnly(nn.Module):
    """The re-ID network alone, trained on raw and desensitized images (mode C, the baseline).

    Args:
        reid: Images -> identity (C).
        output_mode: Which images it sees in training: both, origin or protected.

    Raises:
        UserError: If the output mode is unknown.
    """

    def __init__(self, reid: ReIDNetwork, *, output_mode: str = "both") -> None:
        super().__init__()
        self._seen = _seen_by_reid(output_mode)
        self.reid = reid

    @property
    def discriminators(self) -> tuple[PatchDiscriminator, ...]:
        """None here."""
        return ()

    @property
    def official_networks(self) -> dict[str, nn.Module]:
        """Networks by the letter that names their file in an official checkpoint folder."""
        return {"C": self.reid}

    def forward(self, raw: Tensor, desensitized: Tensor) -> ReIDPair:
        """Run the re-ID network on raw and desensitized images (B, 3, H, W) as OUTPUT_MODE asks."""
        reid_raw, reid_protected = _reid_pair(self.reid, raw, desensitized, self._seen)
        return ReIDPair(reid_raw=reid_raw, reid_protected=reid_protected)


Networks = PrivacyNetworks | ReIDOnly
