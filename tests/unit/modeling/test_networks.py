"""Networks: every backbone, sizes, start weights, precision, and errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from modeling.backbones.registry import REID_DESIGNS
from modeling.gan import PatchDiscriminator, UNet
from modeling.reid_network import ReIDNetwork
from utils.errors import UserError

CASES = [*((name, (64, 32)) for name in REID_DESIGNS), ("resnet18_nl", (96, 48))]


@pytest.mark.parametrize(("name", "size"), CASES, ids=str)
def test_every_backbone_runs_both_ways(name: str, size: tuple[int, int]) -> None:
    network = ReIDNetwork(5, name)
    out = network(torch.randn(2, 3, *size))

    assert out.logits.shape == (2, 5)
    assert out.feature.shape == out.embedding.shape == (2, network.feature_size)
    (out.logits.square().sum() + out.feature.square().sum()).backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(
    ("name", "reference"),
    [("resnet18", torchvision.models.resnet18), ("resnet50", torchvision.models.resnet50)],
)
def test_a_resnet_is_that_of_torchvision(name: str, reference: Callable[[], nn.Module]) -> None:
    """Start values, state of the random numbers, and outputs are the same bit for bit."""
    torch.manual_seed(1)
    expected = reference()
    after = torch.rand(1)
    torch.manual_seed(1)
    design = REID_DESIGNS[name]
    base = design.backbone(last_stride=2, stem_relu=True).eval()
    assert torch.equal(torch.rand(1), after)
    state = expected.state_dict()
    assert list(base.state_dict()) == [key for key in state if not key.startswith("fc.")]
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    image = torch.randn(1, 3, 64, 32)
    expected.avgpool = expected.fc = nn.Identity()
    with torch.inference_mode():
        assert torch.equal(base(image).flatten(1), expected.eval()(image))


@pytest.mark.parametrize(("stride", "factor"), [(1, 16), (2, 32)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_last_stride(name: str, stride: int, factor: int) -> None:
    base = ReIDNetwork(2, name, last_stride=stride).base
    assert base(torch.randn(1, 3, 64, 32)).shape[2:] == (64 // factor, 32 // factor)


def test_stem_relu_changes_the_features() -> None:
    bare, with_relu = ReIDNetwork(2, "resnet18"), ReIDNetwork(2, "resnet18", stem_relu=True)
    with_relu.load_state_dict(bare.state_dict())
    # all positive where it matters: the pooling that follows hides most negative values
    image = torch.zeros(1, 3, 64, 32)
    nn.init.constant_(bare.base.bn1.bias, -1.0)
    nn.init.constant_(with_relu.base.bn1.bias, -1.0)
    features = [network.eval()(image).feature for network in (bare, with_relu)]
    assert not torch.allclose(*features)


def test_bnneck_bias_is_used_but_not_trained() -> None:
    network = ReIDNetwork(3, "resnet18").eval()
    bias = network.bottleneck.bias
    assert not bias.requires_grad
    assert "bottleneck.bias" in network.state_dict()
    assert (bias == 0).all()

    image = torch.randn(1, 3, 64, 32)
    before = network.embed(image)
    bias.fill_(2.0)
    torch.testing.assert_close(network.embed(image), before + 2.0)
    torch.testing.assert_close(network.embed(image), network(image).embedding)


def test_start_values_of_the_reid_network() -> None:
    network = ReIDNetwork(400, "resnet18_nl")
    assert network.classifier.bias is None
    assert network.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert network.global_pool.p.tolist() == [3.0]
    for block in [*network.base.NL_2, *network.base.NL_3]:
        assert (block.W[1].weight == 0).all()
        assert (block.W[1].bias == 0).all()


@pytest.mark.parametrize("build", [lambda: UNet(5, 16), PatchDiscriminator])
def test_start_values_of_image_networks(build: Callable[[], nn.Module]) -> None:
    network = build()
    convolutions = [
        module.weight.flatten()
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    ]
    norms = [module.weight for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    weights, gains = torch.cat(convolutions), torch.cat(norms)
    assert weights.mean().item() == pytest.approx(0, abs=1e-4)
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert gains.mean().item() == pytest.approx(1, abs=0.005)
    assert gains.std().item() == pytest.approx(0.02, rel=0.1)
    for key, parameter in network.named_parameters():
        if key.endswith("bias"):
            assert (parameter == 0).all(), key


def test_only_the_last_convolution_of_the_unet_has_a_bias() -> None:
    biased = [
        name
        for name, module in UNet(5, 4).named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None
    ]
    assert biased == ["model.model.3"]


@pytest.mark.parametrize(
    ("num_downs", "size"), [(7, (256, 128)), (6, (128, 64)), (5, (64, 32))], ids=str
)
def test_unet_sizes(num_downs: int, size: tuple[int, int]) -> None:
    out = UNet(num_downs, width=2)(torch.randn(2, 3, *size))
    assert out.shape == (2, 3, *size)
    assert out.abs().max() <= 1


def test_discriminator_judges_patches() -> None:
    pair = [torch.randn(2, 3, 128, 64) for _ in range(2)]
    assert PatchDiscriminator(4)(*pair).shape == (2, 1, 14, 6)


@pytest.mark.parametrize("build", [lambda: UNet(5, 4), lambda: ReIDNetwork(3, "resnet18_nl")])
def test_start_values_follow_the_seed(build: type[nn.Module]) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.detach().flatten() for p in build().parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_stays_close_to_float32(training: bool) -> None:
    torch.manual_seed(0)
    image = torch.rand(8, 3, 64, 32) * 2 - 1
    unet, reid = UNet(5, 4).train(training), ReIDNetwork(4, "resnet18_nl").train(training)
    judge = PatchDiscriminator(4).train(training)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            out = reid(image)
            results.append((unet(image), out.feature, out.embedding, judge(image, image).float()))
    for exact, coarse in zip(*results, strict=True):
        assert coarse.dtype == torch.float32
        error = (coarse - exact).norm() / exact.norm()
        assert error < 0.1  # batch statistics of eight images amplify rounding


@pytest.mark.parametrize(
    "build", [lambda: UNet(5, 4), lambda: ReIDNetwork(3, "resnet18_nl")], ids=["unet", "reid"]
)
def test_memory_format_does_not_change_numbers(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = build().eval()
    image = torch.randn(2, 3, 64, 32)

    def run(layout: torch.memory_format) -> torch.Tensor:
        network.to(memory_format=layout)
        out = network(image.contiguous(memory_format=layout))
        return out if isinstance(out, torch.Tensor) else out.embedding

    with torch.no_grad():
        torch.testing.assert_close(
            run(torch.channels_last), run(torch.contiguous_format), rtol=1e-4, atol=1e-4
        )


def test_unknown_backbones_and_wrong_sizes_are_errors() -> None:
    with pytest.raises(UserError, match="MODEL.NAME is 'resnet34'; expected one of resnet101, "):
        ReIDNetwork(2, "resnet34")
    with pytest.raises(UserError, match=r"size is \(96, 64\) with 6 down-samplings; .*by 64"):
        UNet(6, 2)(torch.randn(1, 3, 96, 64))
