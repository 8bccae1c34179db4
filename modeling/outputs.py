"""What the networks return: records with named fields, never tuples of varying shape."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Unweighted losses under stable names, each a 0-d tensor.
LossDict = dict[str, Tensor]


@dataclass(frozen=True)
class ReIDOutput:
    """One pass of the re-ID network over B images; N identities, D features.

    Attributes:
        logits: Class scores (B, N).
        feature: Pooled feature before the BNNeck (B, D): metric losses use it.
        embedding: Feature after the BNNeck (B, D): retrieval uses it.
    """

    logits: Tensor
    feature: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class ReIDPair:
    """The re-ID network's passes over a batch of raw images and over their protected versions.

    Attributes:
        reid_raw: Output for the raw images; None where OUTPUT_MODE leaves it out.
        reid_protected: Output for the protected images; None likewise.
    """

    reid_raw: ReIDOutput | None
    reid_protected: ReIDOutput | None


@dataclass(frozen=True)
class PrivacyOutput(ReIDPair):
    """One joint pass over B raw images of H x W pixels; protected images are anonymized ones.

    Attributes:
        anonymized: Anonymizer's output (B, 3, H, W) in [-1, 1].
        recovered: Recovery network's output for it (B, 3, H, W) in [-1, 1].
    """

    anonymized: Tensor
    recovered: Tensor
