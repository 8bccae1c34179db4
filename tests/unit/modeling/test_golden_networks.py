"""Networks with golden weights give golden outputs, and their keys are those of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from modeling.gan import PatchDiscriminator, UNet
from modeling.reid_network import ReIDNetwork
from tests.fixtures.golden import (
    golden_arrays,
    golden_images,
    golden_json,
    golden_state_dict,
)

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def expect(actual: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, golden_arrays("networks.npz")[name], **TOLERANCE)


def with_golden_weights(build: Callable[[], nn.Module], keys_file: str) -> nn.Module:
    with torch.device("meta"):  # start values would only be replaced
        network = build()
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes == golden_json(keys_file)
    network.load_state_dict(golden_state_dict(keys_file), assign=True)
    return network


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("name", "golden"), [("resnet50_nl", "agw_resnet50_nl"), ("resnet50", "agw_resnet50_plain")]
)
def test_reid_network(name: str, golden: str) -> None:
    network = with_golden_weights(lambda: ReIDNetwork(751, name), f"{golden}.keys.json")
    images = golden_images()

    expect(network.eval()(images).embedding, f"{golden}_eval")

    out = network.train()(images)
    expect(out.logits[:, :32], f"{golden}_train_scores")
    expect(out.feature, f"{golden}_train_feat")


def test_unet() -> None:
    network = with_golden_weights(UNet, "unet_128.keys.json")
    images = golden_images()

    out = network.eval()(images)
    expect(out[:, :, 100:116, 40:56], "unet_128_eval_crop")
    expect(torch.stack((out.mean(), out.std(correction=0))), "unet_128_eval_mean_std")

    expect(network.train()(images)[:, :, 100:116, 40:56], "unet_128_train_crop")


def test_patch_discriminator() -> None:
    network = with_golden_weights(PatchDiscriminator, "patchgan_70.keys.json").eval()
    images = golden_images()
    expect(network(images, images.flip(0)), "patchgan_70_eval")


@pytest.mark.parametrize(("network", "millions"), [(UNet, 41.8), (PatchDiscriminator, 2.77)])
def test_parameter_counts(network: type[nn.Module], millions: float) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in network().parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.05 if millions > 10 else 0.005)
