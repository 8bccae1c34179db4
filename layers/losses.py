"""Losses: triplet and centre losses of features, adversarial losses of discriminators.

All are computed in float32, also under autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.device import full_precision

SMALLEST_SQUARE = 1e-12


def pairwise_euclidean(first: Tensor, second: Tensor) -> Tensor:
    """Return the distances of vectors (M, D) and (N, D), float32 (M, N), at least 1e-6.

    Differences are summed directly. The usual |a|^2 + |b|^2 - 2ab loses the digits of small
    distances, and the rounding error of a zero distance then has a gradient of order 1/error. Here
    the gradient of a pair closer than 1e-6 (an image with itself, duplicates) is zero.
    """
    with full_precision(first):
        distances = torch.cdist(
            first.float(), second.float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return distances.clamp(min=SMALLEST_SQUARE**0.5)


class CenterLoss(nn.Module):
    """Batch mean of the squared distance between each feature and the centre of its identity.

    The centres are learnt, by a separate optimiser.

    Source: Y. Wen, K. Zhang, Z. Li, Y. Qiao, "A Discriminative Feature Learning Approach for Deep
    Face Recognition", ECCV 2016; without its factor 1/2.
    """

    def __init__(self, num_classes: int, feature_size: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.randn(num_classes, feature_size))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the 0-d float32 loss of features (B, D) with labels (B,) in 0..N-1."""
        with full_precision(features):
            differences = features.float() - self.centers[labels]
            return differences.square().sum(dim=1).mean()


GANLoss = Callable[[Tensor, bool], Tensor]


def vanilla_gan_loss(prediction: Tensor, is_real: bool) -> Tensor:
    """Mean binary cross-entropy of logits of any shape against 1 (real) or 0; 0-d float32."""
    with full_precision(prediction):
        logits = prediction.float()
        # -log sigmoid(x) = softplus(-x) and -log(1 - sigmoid(x)) = softplus(x)
        return functional.softplus(-logits if is_real else logits).mean()


def least_squares_gan_loss(prediction: Tensor, is_real: bool) -> Tensor:
    """Mean squared distance of values of any shape to 1 (real) or 0; 0-d float32.

    Source: X. Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017.
    """
    with full_precision(prediction):
        return (prediction.float() - float(is_real)).square().mean()


GAN_LOSSES: dict[str, GANLoss] = {"vanilla": vanilla_gan_loss, "lsgan": least_squares_gan_loss}


def weighted_regularized_triplet_loss(
    features: Tensor, labels: Tensor, *, normalized: bool = False
) -> Tensor:
    """Softplus of (weighted mean positive distance - weighted mean negative distance).

    Features are (B, D), scaled to length 1 first if ``normalized``, and identities are (B,). The
    result is the mean over anchors, 0-d float32.

    Weights are proportional to exp(d) for positives and exp(-d) for negatives, so that hard pairs
    count most, without a margin. An anchor is a positive of itself. Without negatives in the batch
    their mean is 0.

    Source: M. Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook" (AGW),
    TPAMI 2021.
    """
    distances, positive = _distances_and_positives(features, labels, normalized=normalized)
    with full_precision(distances):
        hardest_positive = (_weights(distances, positive) * distances).sum(dim=1)
        hardest_negative = (_weights(-distances, ~positive) * distances).sum(dim=1)
        return functional.softplus(hardest_positive - hardest_negative).mean()


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    """Mean over anchors of max(0, farthest positive - nearest negative + margin).

    Features are (B, D), identities (B,), the result is 0-d float32. A negative should be farther
    away than a positive by the margin. An anchor is a positive of itself; one without negatives in
    the batch contributes 0.

    Source: A. Hermans, L. Beyer, B. Leibe, "In Defense of the Triplet Loss for Person
    Re-Identification", 2017.
    """
    distances, positive = _distances_and_positives(features, labels)
    with full_precision(distances):
        farthest_positive = distances.masked_fill(~positive, float("-inf")).amax(dim=1)
        nearest_negative = distances.masked_fill(positive, float("inf")).amin(dim=1)
        return functional.relu(farthest_positive - nearest_negative + margin).mean()


def _distances_and_positives(
    features: Tensor, labels: Tensor, *, normalized: bool = False
) -> tuple[Tensor, Tensor]:
    """Return distances (B, B) and the mask of pairs of the same identity (B, B)."""
    with full_precision(features):
        features = features.float()
        if normalized:
            features = functional.normalize(features, dim=1)
    return pairwise_euclidean(features, features), labels[:, None] == labels[None, :]


def _weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax of scores (B, B) over the entries of each row that the mask selects.

    Other entries count as 0 in the row's maximum, and 1e-6 is added to the sum: together this makes
    the weights of very distant negatives vanish. Other entries are filled before the exponential,
    which could overflow there (0 * inf is NaN).
    """
    largest = (scores * mask).amax(dim=1, keepdim=True)
    exponentials = (scores - largest).masked_fill(~mask, float("-inf")).exp()
    return exponentials / (exponentials.sum(dim=1, keepdim=True) + 1e-6)
