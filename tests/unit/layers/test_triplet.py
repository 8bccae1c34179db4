"""Triplet and centre losses against naive loops, gradients included, and their corner cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layers.losses import (
    CenterLoss,
    batch_hard_triplet_loss,
    pairwise_euclidean,
    weighted_regularized_triplet_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def weighted_regularized(features: Tensor, labels: Tensor) -> Tensor:
    return weighted_regularized_triplet_loss(features, labels)


def normalized(features: Tensor, labels: Tensor) -> Tensor:
    return weighted_regularized_triplet_loss(features, labels, normalized=True)


def batch_hard(features: Tensor, labels: Tensor) -> Tensor:
    return batch_hard_triplet_loss(features, labels, margin=0.3)


def naive_distance(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().sum().clamp(min=1e-12).sqrt()


def naive_weighted_regularized(features: Tensor, labels: Tensor) -> Tensor:
    total = features.new_zeros(())
    for anchor, label in zip(features, labels, strict=True):
        means = []
        for is_positive in (True, False):
            sign = 1.0 if is_positive else -1.0
            distances = [naive_distance(anchor, other) for other in features]
            kept = [bool(other == label) is is_positive for other in labels]
            scores = [sign * d if k else d * 0 for d, k in zip(distances, kept, strict=True)]
            largest = max(score.item() for score in scores)
            powers = [
                (s - largest).exp() if k else s * 0 for s, k in zip(scores, kept, strict=True)
            ]
            weights = [power / (sum(powers) + 1e-6) for power in powers]
            means.append(sum(w * d for w, d in zip(weights, distances, strict=True)))
        total = total + (1 + (means[0] - means[1]).exp()).log()
    return total / len(features)


def naive_normalized(features: Tensor, labels: Tensor) -> Tensor:
    return naive_weighted_regularized(torch.stack([f / f.norm() for f in features]), labels)


def naive_batch_hard(features: Tensor, labels: Tensor) -> Tensor:
    losses = []
    for anchor, label in zip(features, labels, strict=True):
        pairs = list(zip(features, labels, strict=True))
        positives = [naive_distance(anchor, other) for other, its in pairs if its == label]
        negatives = [naive_distance(anchor, other) for other, its in pairs if its != label]
        losses.append((max(positives) - min(negatives) + 0.3).clamp(min=0))
    return torch.stack(losses).mean()


NAIVE: dict[Loss, Loss] = {
    weighted_regularized: naive_weighted_regularized,
    normalized: naive_normalized,
    batch_hard: naive_batch_hard,
}
LABELS = {
    "P x K": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "uneven, one identity with one image": [5, 5, 5, 5, 1, 1, 9],
    "every identity once": [3, 1, 2, 0],
}


@pytest.mark.parametrize("loss", NAIVE)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_values_and_gradients_match_naive_loops(
    loss: Loss, labels: list[int], scale: float
) -> None:
    torch.manual_seed(0)
    features = (scale * torch.randn(len(labels), 6)).requires_grad_()
    exact = features.detach().double().requires_grad_()

    value = loss(features, torch.tensor(labels))
    expected = NAIVE[loss](exact, torch.tensor(labels))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)

    (gradient,) = torch.autograd.grad(value, features)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", NAIVE)
@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.randn(4, 3), [1, 1, 1, 1]),
        (torch.ones(4, 3), [0, 0, 1, 1]),
        (torch.zeros(4, 3), [0, 0, 1, 1]),
        (torch.randn(2, 3).repeat_interleave(2, 0), [0, 0, 1, 1]),
        (torch.randn(2, 3).repeat(2, 1), [0, 0, 1, 1]),
        (1e4 * torch.randn(4, 3), [0, 0, 1, 1]),
        (torch.randn(1, 3), [0]),
    ],
    ids=[
        "one identity",
        "all features equal",
        "all features zero",
        "duplicates within identities",
        "duplicates across identities",
        "far apart: exponentials would overflow",
        "a single image",
    ],
)
def test_corner_cases_stay_finite(loss: Loss, features: Tensor, labels: list[int]) -> None:
    features = features.clone().requires_grad_()
    value = loss(features, torch.tensor(labels))
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_anchors_without_negatives_cost_nothing_in_batch_hard() -> None:
    assert batch_hard(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_are_those_of_float32_down_to_a_millionth(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(3, 6).to(dtype), torch.randn(4, 6).to(dtype)
    second[1] = first[2]
    found = pairwise_euclidean(first, second)
    expected = [[naive_distance(a.double(), b.double()) for b in second] for a in first]
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-5, atol=0)
    assert found[2, 1].item() == pytest.approx(1e-6, rel=1e-6)


def test_duplicates_have_no_gradient_of_rounding_noise() -> None:
    features = torch.full((2, 2048), 0.37, requires_grad=True)
    pairwise_euclidean(features, features).sum().backward()
    assert features.grad is not None
    assert (features.grad == 0).all()


@pytest.mark.parametrize("loss", NAIVE)
def test_bfloat16_features_and_autocast_are_computed_in_float32(loss: Loss) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(8, 16).bfloat16(), torch.arange(8) // 2
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(features, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(features.float(), labels), rtol=0, atol=0)


def test_center_loss_matches_a_naive_loop_with_gradients() -> None:
    torch.manual_seed(0)
    loss = CenterLoss(5, 3)
    features = torch.randn(6, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 4, 2, 0, 4])

    value = loss(features, labels)
    expected = sum(
        ((feature - loss.centers[label]) ** 2).sum()
        for feature, label in zip(features, labels, strict=True)
    ) / len(labels)
    torch.testing.assert_close(value, expected)

    inputs = (features, loss.centers)
    for actual, wanted in zip(
        torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(actual, wanted)
