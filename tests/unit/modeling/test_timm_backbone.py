"""timm models as re-ID backbones: all small, with random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from layers.blocks import AveragePooling, GeneralizedMeanPooling
from layers.collectives import CPUSyncBatchNorm, synchronize_norms
from layers.pixels import PixelSpace
from modeling.backbones.timm_backbone import TimmBackbone
from modeling.build import build_reid
from modeling.reid_network import PUBLISHED_PIXELS, ReIDNetwork
from utils.errors import UserError

timm = pytest.importorskip("timm", reason="needs the extra `timm`")

SIZE = (64, 32)


def backbone(name: str, *, last_stride: int = 1, **changes: Any) -> TimmBackbone:
    settings: dict[str, Any] = {"image_size": SIZE, "pixels": PUBLISHED_PIXELS, "stem_relu": False}
    return TimmBackbone(name, last_stride=last_stride, **{**settings, **changes})


@pytest.mark.parametrize(
    ("name", "channels", "positions", "pooling"),
    [
        ("mobilenetv3_small_050", 1024, (4, 2), GeneralizedMeanPooling),
        ("tf_efficientnet_lite0", 1280, (4, 2), GeneralizedMeanPooling),
        ("convnext_atto", 320, (3, 1), AveragePooling),
        ("vit_tiny_patch16_224", 192, (8, 1), AveragePooling),
        ("test_vit", 64, (8, 1), AveragePooling),
    ],
)
def test_every_parameter_is_trained(
    name: str, channels: int, positions: tuple[int, int], pooling: type[nn.Module]
) -> None:
    network = ReIDNetwork(3, f"timm:{name}", image_size=SIZE)
    assert type(network.global_pool) is pooling
    images = torch.randn(4, 3, *SIZE)
    assert network.base(images[:1]).shape == (1, channels, *positions)
    out = network(images)
    assert out.embedding.shape == out.feature.shape == (4, network.feature_size) == (4, channels)
    (out.logits.square().sum() + out.feature.square().sum()).backward()
    for key, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (key != "bottleneck.bias"), key


def test_channels_in_the_last_dimension_are_moved() -> None:
    model = backbone("swin_tiny_patch4_window7_224")
    assert model(torch.zeros(2, 3, *SIZE)).shape == (2, 768, 2, 1)


def test_last_stride_doubles_the_resolution() -> None:
    sizes = [
        backbone("test_efficientnet", last_stride=stride)(torch.zeros(1, 3, *SIZE)).shape[2:]
        for stride in (1, 2)
    ]
    assert sizes == [(4, 2), (2, 1)]


def test_depthwise_convolutions_train_in_float32_on_a_cpu() -> None:
    model = backbone("test_efficientnet").model
    depthwise = next(
        module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1
    )
    x = torch.randn(2, depthwise.in_channels, 8, 8)
    exact = depthwise(x)
    (expected,) = torch.autograd.grad(exact.sum(), depthwise.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise(x)
        with torch.no_grad():
            evaluated = depthwise(x)
            in_bfloat16 = type(depthwise).forward(depthwise, x)
    (gradient,) = torch.autograd.grad(y.sum(), depthwise.weight)
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(gradient, expected)
    assert torch.equal(evaluated, in_bfloat16)
    assert not torch.equal(evaluated, y)


def test_images_reach_the_model_with_the_mean_and_deviation_it_expects() -> None:
    pixels = PixelSpace((0.2, 0.3, 0.4), (0.3, 0.6, 0.5))
    for name in ("test_efficientnet", "tf_efficientnet_lite0"):
        model = backbone(name, last_stride=2, pixels=pixels).eval()
        config = model.model.pretrained_cfg
        images = torch.rand(2, 3, *SIZE)
        expected = model.model(PixelSpace(config["mean"], config["std"]).normalize(images))
        torch.testing.assert_close(model(pixels.normalize(images)), expected)
    assert config["mean"] == (0.5, 0.5, 0.5)


def _save(name: str, path: Path) -> nn.Module:
    model: nn.Module = timm.create_model(name).eval()
    if path.suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(model.state_dict(), path)
    return model


@pytest.mark.parametrize("file", ["test_efficientnet.pth", "test_efficientnet.safetensors"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_weights_of_a_file_give_the_features_of_the_model(
    make_cfg: Callable[..., CfgNode], tmp_path: Path, file: str, as_folder: bool
) -> None:
    model = _save("test_efficientnet", tmp_path / file)
    path = tmp_path if as_folder else tmp_path / file
    cfg = make_cfg(
        "MODEL.NAME", "timm:test_efficientnet.r160_in1k", "MODEL.LAST_STRIDE", "2",
        "MODEL.PRETRAIN_CHOICE", "imagenet", "MODEL.PRETRAIN_PATH", str(path),
    )  # fmt: skip
    images = torch.rand(2, 3, *SIZE)
    config = model.pretrained_cfg
    expected = model.forward_features(PixelSpace(config["mean"], config["std"]).normalize(images))  # type: ignore[operator]
    pixels = PixelSpace(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
    network = build_reid(cfg, 3).eval()
    torch.testing.assert_close(network.base(pixels.normalize(images)), expected)


def test_position_embeddings_are_resampled_to_the_image_size(tmp_path: Path) -> None:
    _save("test_vit", tmp_path / "test_vit.pth")
    model = backbone("test_vit")
    model.load_imagenet_weights(str(tmp_path))
    weights = torch.load(tmp_path / "test_vit.pth", weights_only=True)
    assert weights["pos_embed"].shape != model.model.pos_embed.shape == (1, 8 + 1, 64)
    assert torch.equal(model.model.patch_embed.proj.weight, weights["patch_embed.proj.weight"])


def test_weights_of_another_model_are_an_error(tmp_path: Path) -> None:
    _save("test_efficientnet", tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth does not fit .*.*build the network"):
        backbone("test_resnet", last_stride=2).load_imagenet_weights(str(tmp_path / "weights.pth"))


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"weights\.pth cannot be read as weights"):
        backbone("test_vit").load_imagenet_weights(str(tmp_path / "weights.pth"))
    with pytest.raises(UserError, match="MODEL.PRETRAIN_PATH is '/no/such', which does not exist"):
        backbone("test_vit").load_imagenet_weights("/no/such")


def test_missing_weights_are_an_error_with_everything_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    create = timm.create_model

    def offline(name: str, *, pretrained: bool) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        model: nn.Module = create(name)
        return model

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError) as caught:
        backbone("test_vit").load_imagenet_weights(str(tmp_path))
    text = str(caught.value)
    for part in ("test_vit.pth", "test_vit.safetensors", "no network", "PRETRAIN_CHOICE none"):
        assert part in text


def test_downloaded_weights_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = timm.create_model("test_efficientnet")
    expected = downloaded.conv_stem.weight.clone()
    model = backbone("test_efficientnet")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: downloaded)
    model.load_imagenet_weights()
    assert torch.equal(model.model.conv_stem.weight, expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tf_efficientnet_lite", "such as tf_efficientnet_lite"),
        ("vit_tiny_patch16_224.wrong", r"such as vit_tiny_patch16_224\.augreg"),
        ("hf-hub:somebody/model", r"expected a name of timm\.list_models\(\)"),
        ("crossvit_tiny_240", "one vector instead of spatial features"),
        ("test_resnet", "whose last stage requires stride 2; expected 2"),
    ],
)
def test_models_that_cannot_be_used_are_reported(name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"timm:{name}.*{words}"):
        backbone(name)


def test_an_image_size_that_the_model_cannot_process_is_reported() -> None:
    with pytest.raises(UserError, match=r"IMG_SIZE is \(64, 32\), which .* cannot process"):
        backbone("mixer_s32_224")


def test_strides_and_stems_that_a_model_does_not_have_are_reported() -> None:
    with pytest.raises(UserError, match="LAST_STRIDE is 2 .* no stride; expected 1"):
        backbone("test_vit", last_stride=2)
    with pytest.raises(UserError, match="LAST_STRIDE is 3; expected 1 or 2"):
        backbone("test_vit", last_stride=3)
    with pytest.raises(UserError, match="STEM_RELU is True .*expected False"):
        backbone("test_vit", stem_relu=True)


def test_without_timm_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm:test_vit needs the package timm.*pip install timm"):
        backbone("test_vit")


def test_the_configuration_accepts_any_timm_name(make_cfg: Callable[..., CfgNode]) -> None:
    assert make_cfg("MODEL.NAME", "timm:anything").MODEL.NAME == "timm:anything"
    for name in ("timm:", "tim:resnet18"):
        with pytest.raises(UserError, match="or timm:<name>"):
            make_cfg("MODEL.NAME", name)


def test_distributed_batch_norms_keep_the_activation_that_timm_puts_into_them() -> None:
    model = backbone("test_efficientnet").eval()
    images = torch.randn(2, 3, *SIZE)
    expected, keys = model(images), list(model.state_dict())
    synchronize_norms(model, torch.device("cpu"))
    assert any(isinstance(module, CPUSyncBatchNorm) for module in model.modules())
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(images), expected)
