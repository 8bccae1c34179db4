"""Pooling, the non-local block and the adversarial losses against their definitions."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from layers.blocks import AveragePooling, GeneralizedMeanPooling, NonLocalBlock
from modeling.gan import InnermostBlock, MiddleBlock, UNet


def plain_non_local(block: NonLocalBlock, features: Tensor) -> Tensor:
    """The definition, with the whole HW x HW affinity, through the block's own modules."""
    theta = block.theta(features).flatten(2)
    phi = block.phi(features).flatten(2)
    g = block.g(features).flatten(2)
    affinity = theta.transpose(1, 2) @ phi / phi.shape[-1]  # (B, HW, HW)
    response = (affinity @ g.transpose(1, 2)).transpose(1, 2)
    return features + block.W(response.unflatten(2, features.shape[2:]))


def random_block(channels: int) -> NonLocalBlock:
    torch.manual_seed(0)
    block = NonLocalBlock(channels)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    return block


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_non_local_block_equals_its_plain_form(channels_last: bool, training: bool) -> None:
    block = random_block(6).train(training)
    twin = copy.deepcopy(block)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(3, 6, 4, 5).contiguous(memory_format=layout)
    first, second = images.clone().requires_grad_(), images.clone().requires_grad_()
    slope = torch.randn_like(images)

    for _ in range(2):  # twice: running statistics move
        out, expected = block(first), plain_non_local(twin, second)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=layout)

    (out * slope).sum().backward()
    (expected * slope).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (name, ours), theirs in zip(block.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")


def test_non_local_block_starts_as_the_identity() -> None:
    features = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(NonLocalBlock(4)(features), features, rtol=0, atol=0)


def test_non_local_block_with_another_norm_takes_the_plain_way() -> None:
    class OtherNorm(nn.BatchNorm2d):
        def forward(self, features: Tensor) -> Tensor:
            return 3 * super().forward(features)

    block = random_block(4)
    twin = copy.deepcopy(block)
    other = OtherNorm(4)
    other.load_state_dict(block.W[1].state_dict())
    block.W[1] = other
    features = torch.randn(2, 4, 3, 3)
    change = plain_non_local(twin, features) - features
    torch.testing.assert_close(block(features), features + 3 * change)


def test_generalized_mean() -> None:
    pool = GeneralizedMeanPooling()
    features = torch.rand(2, 3, 4, 5) + 0.1
    expected = features.double().pow(3).mean((2, 3)).pow(1 / 3).float()
    torch.testing.assert_close(pool(features), expected)

    torch.nn.init.ones_(pool.p)
    torch.testing.assert_close(pool(features), AveragePooling()(features))


def test_generalized_mean_of_negative_values_is_the_floor_and_its_gradient_finite() -> None:
    pool = GeneralizedMeanPooling()
    features = -torch.rand(1, 2, 3, 3).requires_grad_()
    pooled = pool(features)
    torch.testing.assert_close(pooled, torch.full((1, 2), 1e-6), rtol=1e-4, atol=0)
    pooled.sum().backward()
    assert pool.p.grad is not None
    assert pool.p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_the_generalized_mean(dtype: torch.dtype, channels_last: bool) -> None:
    """Gradients of features, partly below the floor, and of the exponent equal autograd's."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(4, 6, 5, 3).to(dtype).contiguous(memory_format=layout)
    slope = torch.randn(4, 6)
    pool = GeneralizedMeanPooling(2.7)
    first = images.clone().requires_grad_()
    (pool(first) * slope).sum().backward()

    second = images.double().requires_grad_()
    exponent = pool.p.detach().double().requires_grad_()
    powers = second.clamp(min=pool.floor).pow(exponent)
    (powers.mean((2, 3)).pow(1 / exponent) * slope).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert (first.grad == 0).any()
    assert first.grad.is_contiguous(memory_format=layout)
    torch.testing.assert_close(first.grad, second.grad.to(dtype))
    torch.testing.assert_close(pool.p.grad, exponent.grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [GeneralizedMeanPooling(), AveragePooling()])
def test_pooling_is_float32_under_autocast(pool: nn.Module) -> None:
    features = torch.rand(2, 3, 4, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pool(features)
    torch.testing.assert_close(pooled, pool(features.float()), rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_unet_blocks_join_as_torch_does(channels_last: bool) -> None:
    """Output and all gradients equal those of a block that uses torch.cat."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    block = MiddleBlock(4, 6, InnermostBlock(6, 6)).to(memory_format=layout)
    twin = copy.deepcopy(block)

    def plain(one: MiddleBlock | InnermostBlock, features: Tensor) -> Tensor:
        features, modules = features.clone(), list(one.model)
        below = features
        for module in modules:
            inner = isinstance(module, InnermostBlock)
            below = plain(module, below) if inner else module(below)
        return torch.cat((features, below), dim=1)

    images = torch.randn(3, 4, 8, 8).contiguous(memory_format=layout)
    first, second = images.clone().requires_grad_(), images.clone().requires_grad_()
    out, expected = block(first.clone()), plain(twin, second.clone())
    assert torch.equal(out, expected)
    slope = torch.randn_like(out)
    (out * slope).sum().backward()
    (expected * slope).sum().backward()
    torch.testing.assert_close(first.grad, second.grad)
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_traced_unet_can_be_saved(tmp_path: Path) -> None:
    network, images = UNet(5, 2).eval(), torch.randn(1, 3, 32, 32)
    torch.jit.save(torch.jit.trace(network, images), tmp_path / "network.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "network.pt")(images), network(images))
