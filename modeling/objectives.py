"""Every loss term and its weight, in one place.

Terms come unweighted under stable names; ``weighted`` adds them up. All are float32, whatever
autocast does around them. A loss is added with a function, a line in ``GENERATOR_TERMS`` or
``REID_TERMS``, and its weight in ``configs/defaults.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from layers.losses import CenterLoss, GANLoss
from modeling.privacy_networks import PrivacyNetworks
from modeling.reid_network import LossDict, PrivacyOutput, ReIDOutput, ReIDPair
from utils.precision import full_precision

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


@dataclass(frozen=True)
class GeneratorInput:
    """What a term of anonymizer and recovery network is computed from.

    Attributes:
        raw: Normalised images (B, 3, H, W).
        target: What the anonymizer should reach (B, 3, H, W).
        out: The networks' output for ``raw``, attached.
        judged_anonymized: What D1 says of (raw, anonymized).
        judged_recovered: What D2 says of (anonymized, recovered).
    """

    raw: Tensor
    target: Tensor
    out: PrivacyOutput
    judged_anonymized: Tensor
    judged_recovered: Tensor


@dataclass(frozen=True)
class ReIDInput:
    """What a term of the re-ID network is computed from, on images of one kind.

    Attributes:
        output: The network's output for this process's images.
        label: Their class indices (b,).
        features, labels: Features (B, D) and class indices (B,) of the whole batch.
    """

    output: ReIDOutput
    label: Tensor
    features: Tensor
    labels: Tensor


def _anonymization(seen: GeneratorInput, _: Objectives) -> Tensor:
    return functional.l1_loss(seen.out.anonymized.float(), seen.target.float())


def _recovery(seen: GeneratorInput, _: Objectives) -> Tensor:
    return functional.l1_loss(seen.out.recovered.float(), seen.raw.float())


def _gan_anonymized(seen: GeneratorInput, objectives: Objectives) -> Tensor:
    return objectives.gan(seen.judged_anonymized, True)


def _gan_recovered(seen: GeneratorInput, objectives: Objectives) -> Tensor:
    return objectives.gan(seen.judged_recovered, True)


def _cross_entropy(seen: ReIDInput, objectives: Objectives) -> Tensor:
    logits = seen.output.logits.float()
    return functional.cross_entropy(logits, seen.label, label_smoothing=objectives.label_smoothing)


def _triplet(seen: ReIDInput, objectives: Objectives) -> Tensor:
    return objectives.triplet(seen.features, seen.labels)


def _center(seen: ReIDInput, objectives: Objectives) -> Tensor | None:
    if objectives.centers is None:
        return None
    centers: Tensor = objectives.centers(seen.features, seen.labels)
    return centers


# Each returns a 0-d float32 loss, autocast being off; None where the loss is switched off. With it
# stand the keys whose product is its weight.
GeneratorLoss = Callable[[GeneratorInput, Objectives], Tensor | None]
ReIDLoss = Callable[[ReIDInput, Objectives], Tensor | None]
GENERATOR_TERMS: dict[str, tuple[GeneratorLoss, tuple[str, ...]]] = {
    "anonymization": (_anonymization, ("LOSS.ANONYMIZATION",)),
    "recovery": (_recovery, ("LOSS.RECOVERY",)),
    "gan_anonymized": (_gan_anonymized, ("LOSS.GAN",)),
    "gan_recovered": (_gan_recovered, ("LOSS.GAN",)),
}
# Each stands for two terms, reid_raw_* and reid_protected_*.
REID_TERMS: dict[str, tuple[ReIDLoss, tuple[str, ...]]] = {
    "cross_entropy": (_cross_entropy, ("LOSS.REID",)),
    "triplet": (_triplet, ("LOSS.REID",)),
    "center": (_center, ("LOSS.REID", "SOLVER.CENTER_LOSS_WEIGHT")),
}


def term_weights(value_of: Callable[[str], float]) -> dict[str, float]:
    """Return the weight of every term by its name.

    Args:
        value_of: Gives the value of a key of the configuration.
    """
    keys = {name: names for name, (_, names) in GENERATOR_TERMS.items()}
    for kind in ("raw", "protected"):
        keys |= {f"reid_{kind}_{name}": names for name, (_, names) in REID_TERMS.items()}
    return {name: math.prod(value_of(key) for key in names) for name, names in keys.items()}


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
    judged = judge_anonymized(raw, out.anonymized), judge_recovered(out.anonymized, out.recovered)
    seen = GeneratorInput(raw, target, out, *judged)
    with full_precision(raw):
        losses = {name: loss(seen, objectives) for name, (loss, _) in GENERATOR_TERMS.items()}
    return _switched_on(losses)


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
    seen = ReIDInput(output, label, *objectives.whole_batch(output.feature, label))
    with full_precision(output.logits):
        losses = {name: loss(seen, objectives) for name, (loss, _) in REID_TERMS.items()}
    return _switched_on(losses)


def _switched_on(losses: Mapping[str, Tensor | None]) -> LossDict:
    return {name: loss for name, loss in losses.items() if loss is not None}
