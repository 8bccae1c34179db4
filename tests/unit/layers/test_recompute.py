"""Recomputed activations: the same numbers, and less is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from layers.blocks import set_recompute
from modeling.gan import UNet
from modeling.reid_network import ReIDNetwork


def _reid() -> nn.Module:
    network = ReIDNetwork(4, "resnet18_nl")
    for name, value in network.named_parameters():
        if "W.1" in name:  # the non-local blocks start as the identity
            nn.init.normal_(value)
    return network.base


NETWORKS = {"U-Net": lambda: UNet(5, 2), "re-ID": _reid}


def _train_once(network: nn.Module, images: Tensor) -> tuple[Tensor, int]:
    """Run forward and backward; returns the output and the bytes kept in between."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(images)
    out.square().mean().backward()
    return out.detach(), sum(kept)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_statistics_are_the_same(name: str, training: bool) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().train(training)
    twin = copy.deepcopy(network)
    set_recompute(twin, True)
    images = torch.randn(3, 3, 64, 32)
    for _ in range(2):
        out, kept = _train_once(network, images)
        again, kept_again = _train_once(twin, images)
        assert torch.equal(out, again)
    assert kept_again < kept / 2
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    for (key, one), other in zip(
        network.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), key  # running statistics and their counters among them


def test_it_can_be_taken_back() -> None:
    network = UNet(5, 2)
    images = torch.randn(2, 3, 32, 32)
    plain = _train_once(network, images)[1]
    set_recompute(network, True)
    assert _train_once(network, images)[1] < plain
    set_recompute(network, False)
    assert _train_once(network, images)[1] == plain
