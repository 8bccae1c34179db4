"""All loss terms of a training step, and their weights.

Terms are unweighted and have fixed names; ``weighted`` adds them up. All are computed in float32,
also under autocast. A new loss needs a function, a line in ``GENERATOR_TERMS``, ``REID_TERMS`` or
``PAIR_TERMS``, and the key of its weight in ``configs/defaults.py``.
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
from utils.device import full_precision

TripletLoss = Callable[[Tensor, Tensor], Tensor]
# Features (b, D) and labels (b,) of this process -> those of the whole batch, (B, D) and (B,).
WholeBatch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _unchanged(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return features, labels


@dataclass(frozen=True)
class Objectives:
    """Losses of a training and their weights."""

    triplet: TripletLoss  # metric loss of features (B, D) and labels (B,)
    label_smoothing: float  # share of the probability that is spread over all classes
    centers: CenterLoss | None  # centre loss; None if it is not used
    gan: GANLoss  # adversarial loss of a prediction and a bool: whether the target is real
    # Weight of every term of ``generator_losses`` and ``reid_losses`` by name. A pair term without
    # a weight is not computed.
    weights: Mapping[str, float]
    # gathers features and labels of all processes, for triplet and centre losses
    whole_batch: WholeBatch = _unchanged


@dataclass(frozen=True)
class GeneratorInput:
    """Input of a loss term of anonymizer and recovery network."""

    raw: Tensor  # normalised images (B, 3, H, W)
    target: Tensor  # target of the anonymizer (B, 3, H, W)
    out: PrivacyOutput  # the networks' output for ``raw``, with its graph
    judged_anonymized: Tensor  # output of D1 for (raw, anonymized)
    judged_recovered: Tensor  # output of D2 for (anonymized, recovered)


@dataclass(frozen=True)
class ReIDInput:
    """Input of a loss term of the re-ID network, for raw or for protected images."""

    output: ReIDOutput  # the network's output for this process's images
    label: Tensor  # their class indices (b,)
    features: Tensor  # features (B, D) of the whole batch
    labels: Tensor  # class indices (B,) of the whole batch


def _anonymization(inputs: GeneratorInput, _: Objectives) -> Tensor:
    return functional.l1_loss(inputs.out.anonymized.float(), inputs.target.float())


def _recovery(inputs: GeneratorInput, _: Objectives) -> Tensor:
    return functional.l1_loss(inputs.out.recovered.float(), inputs.raw.float())


def _gan_anonymized(inputs: GeneratorInput, objectives: Objectives) -> Tensor:
    return objectives.gan(inputs.judged_anonymized, True)


def _gan_recovered(inputs: GeneratorInput, objectives: Objectives) -> Tensor:
    return objectives.gan(inputs.judged_recovered, True)


def _cross_entropy(inputs: ReIDInput, objectives: Objectives) -> Tensor:
    logits = inputs.output.logits.float()
    return functional.cross_entropy(
        logits, inputs.label, label_smoothing=objectives.label_smoothing
    )


def _triplet(inputs: ReIDInput, objectives: Objectives) -> Tensor:
    return objectives.triplet(inputs.features, inputs.labels)


def _center(inputs: ReIDInput, objectives: Objectives) -> Tensor | None:
    if objectives.centers is None:
        return None
    centers: Tensor = objectives.centers(inputs.features, inputs.labels)
    return centers


def _alignment(raw: ReIDInput, protected: ReIDInput, _: Objectives) -> Tensor:
    """Return the mean cosine distance of protected embeddings to the raw ones, which are fixed."""
    target = raw.output.embedding.detach().float()
    return 1 - functional.cosine_similarity(protected.output.embedding.float(), target).mean()


def _consistency(raw: ReIDInput, protected: ReIDInput, _: Objectives) -> Tensor:
    """Return the mean KL divergence of predictions on protected from those on raw images."""
    target = raw.output.logits.detach().float().log_softmax(1)
    predicted = protected.output.logits.float().log_softmax(1)
    return functional.kl_div(predicted, target, reduction="batchmean", log_target=True)


def _cross_triplet(raw: ReIDInput, protected: ReIDInput, objectives: Objectives) -> Tensor:
    """Return the metric loss of raw and protected images as one batch.

    Source: M. Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI
    2021, which uses it for visible and infrared images.
    """
    features = torch.cat([raw.features, protected.features])
    return objectives.triplet(features, torch.cat([raw.labels, protected.labels]))


# Name -> function that returns a 0-d float32 loss (None if the loss is switched off), and the keys
# whose product is its weight.
GeneratorLoss = Callable[[GeneratorInput, Objectives], Tensor | None]
ReIDLoss = Callable[[ReIDInput, Objectives], Tensor | None]
PairLoss = Callable[[ReIDInput, ReIDInput, Objectives], Tensor]
GENERATOR_TERMS: dict[str, tuple[GeneratorLoss, tuple[str, ...]]] = {
    "anonymization": (_anonymization, ("LOSS.ANONYMIZATION",)),
    "recovery": (_recovery, ("LOSS.RECOVERY",)),
    "gan_anonymized": (_gan_anonymized, ("LOSS.GAN",)),
    "gan_recovered": (_gan_recovered, ("LOSS.GAN",)),
}
# Each entry gives two terms, reid_raw_* and reid_protected_*.
REID_TERMS: dict[str, tuple[ReIDLoss, tuple[str, ...]]] = {
    "cross_entropy": (_cross_entropy, ("LOSS.REID",)),
    "triplet": (_triplet, ("LOSS.REID",)),
    "center": (_center, ("LOSS.REID", "SOLVER.CENTER_LOSS_WEIGHT")),
}
# Terms of raw images and their protected versions together, without `LOSS.REID`; 0 is off.
PAIR_TERMS: dict[str, tuple[PairLoss, tuple[str, ...]]] = {
    "reid_alignment": (_alignment, ("LOSS.ALIGNMENT",)),
    "reid_consistency": (_consistency, ("LOSS.CONSISTENCY",)),
    "reid_cross_triplet": (_cross_triplet, ("LOSS.CROSS_TRIPLET",)),
}


def term_weights(value_of: Callable[[str], float]) -> dict[str, float]:
    """Return the weight of every term by its name, without pair terms whose weight is 0."""
    keys = {name: names for name, (_, names) in GENERATOR_TERMS.items()}
    for images in ("raw", "protected"):
        keys |= {f"reid_{images}_{name}": names for name, (_, names) in REID_TERMS.items()}
    keys |= {name: names for name, (_, names) in PAIR_TERMS.items()}
    weights = {name: math.prod(value_of(key) for key in names) for name, names in keys.items()}
    return {name: weight for name, weight in weights.items() if weight or name not in PAIR_TERMS}


def discriminator_losses(
    nets: PrivacyNetworks, raw: Tensor, target: Tensor, out: PrivacyOutput, objectives: Objectives
) -> LossDict:
    """Return the losses of the discriminators, unweighted; they minimise the sum of all four.

    For D1 (raw, anonymized) is fake and (raw, target) is real; for D2 (anonymized, recovered) is
    fake and (anonymized, raw) is real. Images are detached, so that generators get no gradients.
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
    """Return the losses of anonymizer and recovery network, without the re-ID terms.

    Call it inside ``frozen(*nets.discriminators)``, since discriminators need no gradients here.
    """
    judge_anonymized, judge_recovered = nets.discriminators
    judged = judge_anonymized(raw, out.anonymized), judge_recovered(out.anonymized, out.recovered)
    inputs = GeneratorInput(raw, target, out, *judged)
    with full_precision(raw):
        losses = {name: loss(inputs, objectives) for name, (loss, _) in GENERATOR_TERMS.items()}
    return _switched_on(losses)


def reid_losses(out: ReIDPair, label: Tensor, objectives: Objectives) -> LossDict:
    """Return the identity losses on raw and on protected images, and the pair terms with a weight.

    Args:
        out: Outputs for raw and for protected images; None gives no terms.
        label: Class indices (B,).
        objectives: Metric loss, smoothing and centres.
    """
    outputs = {"raw": out.reid_raw, "protected": out.reid_protected}
    inputs = {
        images: ReIDInput(output, label, *objectives.whole_batch(output.feature, label))
        for images, output in outputs.items()
        if output is not None
    }
    with full_precision(label):
        losses = {
            f"reid_{images}_{name}": loss(each, objectives)
            for images, each in inputs.items()
            for name, (loss, _) in REID_TERMS.items()
        }
        if len(inputs) == len(outputs):
            losses |= {
                name: loss(inputs["raw"], inputs["protected"], objectives)
                for name, (loss, _) in PAIR_TERMS.items()
                if name in objectives.weights
            }
    return _switched_on(losses)


def weighted(losses: LossDict, weights: Mapping[str, float] | None = None) -> Tensor:
    """Return the 0-d sum of the losses, each times its weight.

    Args:
        losses: Terms by name, at least one.
        weights: Weight of each name; all 1 if None. A name without a weight is a KeyError;
            further weights are ignored.
    """
    terms = torch.stack([loss.float() for loss in losses.values()])
    if weights is None:
        return terms.sum()
    return (terms * _factors(tuple(weights[name] for name in losses), terms.device)).sum()


@lru_cache(maxsize=16)
def _factors(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return weights as a tensor, which is cached: copying it to a GPU makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def _switched_on(losses: Mapping[str, Tensor | None]) -> LossDict:
    return {name: loss for name, loss in losses.items() if loss is not None}
