"""Every loss term and its weight, in one place.

Terms come unweighted under stable names; ``weighted`` adds them up. All are float32, whatever
autocast does around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from layers.center import CenterLoss
from layers.gan import GANLoss
from layers.precision import full_precision
from modeling.outputs import LossDict, PrivacyOutput, ReIDOutput, ReIDPair
from modeling.privacy_networks import PrivacyNetworks

TripletLoss = Callable[[Tensor, Tensor], Tensor]
# Features (b, D) and labels (b,) of this process's images -> those of the whole batch.
WholeBatch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _as_they_are(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return features, labels


@dataclass(frozen=True)
class Objectives:
    """What is minimised.

    Attributes:
        triplet: Metric loss of features (B, D) and labels (B,).
        label_smoothing: Share of the probability that is spread over all classes.
        centers: Centre loss, or None where MODEL.CENTER_LOSS is off.
        gan: Adversarial loss of a prediction and whether it should be judged real.
        weights: Weight of every term of ``generator_losses`` and ``reid_losses`` by name.
        whole_batch: Gathers what triplet and centre losses compare, where several processes share a
            batch.
    """

    triplet: TripletLoss
    label_smoothing: float
    centers: CenterLoss | None
    gan: GANLoss
    weights: Mapping[str, float]
    whole_batch: WholeBatch = _as_they_are


def loss_weights(
    *, reid: float, center: float, anonymization: float, recovery: float, gan: float
) -> dict[str, float]:
    """Return the weight of every term by its name.

    Args:
        reid: Of all re-ID terms together (LOSS.REID).
        center: Of the centre loss within them (SOLVER.CENTER_LOSS_WEIGHT).
        anonymization: Of L1(anonymized, target) (LOSS.ANONYMIZATION).
        recovery: Of L1(recovered, raw) (LOSS.RECOVERY).
        gan: Of fooling each discriminator (LOSS.GAN).
    """
    weights = {
        "anonymization": anonymization,
        "recovery": recovery,
        "gan_anonymized": gan,
        "gan_recovered": gan,
    }
    for kind in ("raw", "protected"):
        weights[f"reid_{kind}_cross_entropy"] = reid
        weights[f"reid_{kind}_triplet"] = reid
        weights[f"reid_{kind}_center"] = reid * center
    return weights


def discriminator_losses(
    nets: PrivacyNetworks, raw: Tensor, target: Tensor, out: PrivacyOutput, objectives: Objectives
) -> LossDict:
    """Return what the discriminators minimise, unweighted: the sum of all four terms.

    D1 sees (raw, anonymized) as fake and (raw, target) as real, D2 (anonymized, recovered) as fake
    and (anonymized, raw) as real. Images are detached: nothing flows into what made them.

    Args:
        nets: The networks.
        raw: Normalised images (B, 3, H, W).
        target: What the anonymizer should reach (B, 3, H, W).
        out: The networks' output for ``raw``.
        objectives: Kind of adversarial loss.
    """
    raw, target = raw.detach(), target.detach()
    anonymized, recovered = out.anonymized.detach(), out.recovered.detach()
    judge_anonymized, judge_recovered = nets.discriminators
    gan = objectives.gan
    return {
        "discriminator_anonymized_fake": gan(judge_anonymized(raw, anonymized), False),
        "discriminator_anonymized_real": gan(judge_anonymized(raw, target), True),
        "discriminator_recovered_fake": gan(judge_recovered(anonymized, recovered), False),
        "discriminator_recovered_real": gan(judge_recovered(anonymized, raw), True),
    }


def generator_losses(
    nets: PrivacyNetworks, raw: Tensor, target: Tensor, out: PrivacyOutput, objectives: Objectives
) -> LossDict:
    """Return what anonymizer and recovery network minimise besides the re-ID terms.

    Call it under ``frozen(*nets.discriminators)``: gradients are meant to flow through them only.

    Args:
        nets: The networks.
        raw: Normalised images (B, 3, H, W).
        target: What the anonymizer should reach (B, 3, H, W).
        out: The networks' output for ``raw``, attached.
        objectives: Kind of adversarial loss.
    """
    judge_anonymized, judge_recovered = nets.discriminators
    judged_anonymized = judge_anonymized(raw, out.anonymized)
    judged_recovered = judge_recovered(out.anonymized, out.recovered)
    with full_precision(raw):
        return {
            "anonymization": functional.l1_loss(out.anonymized.float(), target.float()),
            "recovery": functional.l1_loss(out.recovered.float(), raw.float()),
            "gan_anonymized": objectives.gan(judged_anonymized, True),
            "gan_recovered": objectives.gan(judged_recovered, True),
        }


def reid_losses(out: ReIDPair, label: Tensor, objectives: Objectives) -> LossDict:
    """Return the identity losses of each kind of image the re-ID network has seen.

    Args:
        out: Outputs on raw and on protected images; a kind that is None has no terms.
        label: Class indices (B,).
        objectives: Metric loss, smoothing and centres.
    """
    kinds = {"raw": out.reid_raw, "protected": out.reid_protected}
    return {
        f"reid_{kind}_{term}": value
        for kind, output in kinds.items()
        if output is not None
        for term, value in _identity_losses(output, label, objectives).items()
    }


def weighted(losses: LossDict, weights: Mapping[str, float] | None = None) -> Tensor:
    """Return the 0-d sum of the losses, each times its weight.

    Args:
        losses: Terms by name, at least one.
        weights: Weight of each name; all 1 if None. A name without a weight is a KeyError, a
            weight without its term is left out.
    """
    terms = torch.stack([loss.float() for loss in losses.values()])
    if weights is None:
        return terms.sum()
    return (terms * _factors(tuple(weights[name] for name in losses), terms.device)).sum()


@lru_cache(maxsize=16)
def _factors(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return weights as a tensor; made once, since a GPU makes the host wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def _identity_losses(output: ReIDOutput, label: Tensor, objectives: Objectives) -> LossDict:
    features, labels = objectives.whole_batch(output.feature, label)
    with full_precision(output.logits):
        losses = {
            "cross_entropy": functional.cross_entropy(
                output.logits.float(), label, label_smoothing=objectives.label_smoothing
            ),
            "triplet": objectives.triplet(features, labels),
        }
    if objectives.centers is not None:
        losses["center"] = objectives.centers(features, labels)
    return losses
