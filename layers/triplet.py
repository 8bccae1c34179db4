"""Triplet losses over all pairs of a batch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from layers.distances import pairwise_euclidean
from layers.precision import full_precision


def weighted_regularized_triplet_loss(
    features: Tensor, labels: Tensor, *, normalized: bool = False
) -> Tensor:
    """Softplus of (weighted mean positive distance - weighted mean negative distance).

    Positives weigh like exp(d), negatives like exp(-d): hard ones count most, without a margin.
    An anchor is a positive of itself. Without any negative in the batch that mean is 0.

    Source: M. Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook" (AGW),
    TPAMI 2021.

    Args:
        features: (B, D).
        labels: Identity of each, (B,).
        normalized: Whether to scale features to length 1 first.

    Returns:
        0-d float32, mean over anchors.
    """
    distances, positive = _distances_and_positives(features, labels, normalized=normalized)
    with full_precision(distances):
        hardest_positive = (_weights(distances, positive) * distances).sum(dim=1)
        hardest_negative = (_weights(-distances, ~positive) * distances).sum(dim=1)
        return functional.softplus(hardest_positive - hardest_negative).mean()


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    """Mean over anchors of max(0, farthest positive - nearest negative + margin).

    An anchor is a positive of itself; one without any negative in the batch has nothing to be
    compared with and contributes 0.

    Source: A. Hermans, L. Beyer, B. Leibe, "In Defense of the Triplet Loss for Person
    Re-Identification", 2017.

    Args:
        features: (B, D).
        labels: Identity of each, (B,).
        margin: By how much a negative should be farther than a positive.

    Returns:
        0-d float32.
    """
    distances, positive = _distances_and_positives(features, labels)
    with full_precision(distances):
        farthest_positive = distances.masked_fill(~positive, float("-inf")).amax(dim=1)
        nearest_negative = distances.masked_fill(positive, float("inf")).amin(dim=1)
        return functional.relu(farthest_positive - nearest_negative + margin).mean()


def _distances_and_positives(
    features: Tensor, labels: Tensor, *, normalized: bool = False
) -> tuple[Tensor, Tensor]:
    """Return distances (B, B) and the mask of pairs of one identity (B, B)."""
    with full_precision(features):
        features = features.float()
        if normalized:
            features = functional.normalize(features, dim=1)
    return pairwise_euclidean(features, features), labels[:, None] == labels[None, :]


def _weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax of scores (B, B) over the entries of each row that mask keeps.

    The row's maximum is taken with masked entries as 0, and 1e-6 is added to the sum: together
    they let very distant negatives fade out. Masked entries are filled before the exponential,
    since exp of one could overflow and 0 * inf is not a number.
    """
    largest = (scores * mask).amax(dim=1, keepdim=True)
    exponentials = (scores - largest).masked_fill(~mask, float("-inf")).exp()
    return exponentials / (exponentials.sum(dim=1, keepdim=True) + 1e-6)
