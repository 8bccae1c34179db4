"""ImageNet weights: the folders that are searched, the verification, and messages.

Small files replace the published ones, since the known files are an argument.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from layers.blocks import Backbone
from modeling.backbones.registry import REID_DESIGNS, imagenet_weights
from modeling.weights import KnownFile, find_weights, load_imagenet_weights
from tests.unit.modeling.helpers import FakeWeights
from utils.errors import UserError


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWeights:
    """Known files V1, old and V2 of 'resnet18', with every usual folder inside tmp_path."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    return FakeWeights(tmp_path)


def no_network(known: KnownFile, file: Path) -> None:
    raise OSError("no route to host")


def find(fake: FakeWeights, path: str = "") -> tuple[Path, str]:
    file, known = find_weights(fake.weights, path, fetch=no_network)
    return file, known.what


@pytest.mark.parametrize(
    "folder", ["torch/hub/checkpoints", "home/.cache/torch/hub/checkpoints", "pretrained"]
)
def test_usual_folders(fake: FakeWeights, folder: str) -> None:
    file = fake.put("V1", folder)
    found, what = find(fake)
    assert found.resolve() == file
    assert what == "V1"


def test_without_torch_home(fake: FakeWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_HOME")
    file = fake.put("V1", "home/.cache/torch/hub/checkpoints")
    assert find(fake)[0] == file


def test_a_given_folder_and_a_given_file_come_first(fake: FakeWeights) -> None:
    fake.put("V1", "pretrained")
    file = fake.put("old", "mine")
    assert find(fake, "mine")[1] == "old"
    assert find(fake, str(file)) == (file, "old")


def test_a_renamed_file_is_recognised_by_its_digest(fake: FakeWeights) -> None:
    file = fake.put("V2", "mine").rename(fake.root / "mine" / "weights.pth")
    assert find(fake, str(file)) == (file, "V2")


def test_weights_of_the_ablation_are_not_searched_for(fake: FakeWeights) -> None:
    fake.put("V2", "pretrained")
    with pytest.raises(UserError, match="no ImageNet weights for resnet18"):
        find(fake)
    assert find(fake, "pretrained")[1] == "V2"


def test_a_damaged_file_is_skipped_and_named(fake: FakeWeights) -> None:
    damaged = fake.put("V1", "torch/hub/checkpoints")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    good = fake.put("V1", "pretrained")
    assert find(fake)[0].resolve() == good

    good.unlink()
    with pytest.raises(UserError, match=f"{damaged} \\(damaged: its SHA-256 starts with .*delete"):
        find(fake)
    assert damaged.exists()


def test_failure_lists_every_path_and_what_to_do(fake: FakeWeights) -> None:
    with pytest.raises(UserError) as caught:
        find(fake)
    text = str(caught.value)
    folders = ["torch/hub/checkpoints", "home/.cache/torch/hub/checkpoints"]
    for folder in [fake.root / folder for folder in folders] + [Path("pretrained")]:
        for what in ("V1", "old"):
            assert str(folder / fake.known[what].name) in text
    assert "no route to host" in text
    assert "give its path" in text
    assert "MODEL.PRETRAIN_CHOICE none" in text
    assert "\n" not in text


def test_a_wrong_path_is_an_error(fake: FakeWeights) -> None:
    fake.put("V1", "pretrained")
    with pytest.raises(UserError, match="the path 'mine' does not exist"):
        find(fake, "mine")
    foreign = fake.root / "foreign.pth"
    foreign.write_bytes(b"<html>")
    digest = hashlib.sha256(b"<html>").hexdigest()[:8]
    with pytest.raises(UserError, match=f"the SHA-256 of .*foreign.pth' starts with {digest}"):
        find(fake, str(foreign))


def test_download_is_the_last_resort_and_verified(fake: FakeWeights) -> None:
    asked: list[str] = []

    def download(known: KnownFile, file: Path) -> None:
        asked.append(known.torchvision)
        file.write_bytes(fake.content["V1"])

    file, known = find_weights(fake.weights, "", fetch=download)
    assert asked == ["the V1 address"]
    assert file.parent == fake.root / "torch/hub/checkpoints"
    assert known.what == "V1"
    find_weights(fake.weights, "", fetch=download)
    assert len(asked) == 1

    def proxy_page(known: KnownFile, file: Path) -> None:
        file.write_bytes(b"<html>")

    file.unlink()
    with pytest.raises(UserError, match="download to .*damaged"):
        find_weights(fake.weights, "", fetch=proxy_page)


def test_files_without_a_download_are_only_searched_for(fake: FakeWeights) -> None:
    weights = replace(fake.weights, files=(fake.known["old"],))
    with pytest.raises(UserError, match=f"put {fake.known['old'].name} into one of these folders"):
        find_weights(weights, "", fetch=no_network)
    file = fake.put("old", "pretrained")
    assert find_weights(weights, "", fetch=no_network)[0].resolve() == file


def test_a_backbone_without_imagenet_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = replace(REID_DESIGNS["resnet18"], imagenet=None)
    monkeypatch.setitem(REID_DESIGNS, "plain", plain)
    with pytest.raises(UserError) as caught:
        imagenet_weights("plain")
    text = str(caught.value)
    assert text.startswith("MODEL.PRETRAIN_CHOICE is imagenet with MODEL.NAME plain, for which")
    assert "expected MODEL.NAME one of resnet101, resnet18, " in text
    assert "MODEL.PRETRAIN_CHOICE none" in text
    assert imagenet_weights("resnet50_nl") is REID_DESIGNS["resnet50"].imagenet


def backbone(name: str = "resnet18_nl") -> Backbone:
    return REID_DESIGNS[name].backbone(last_stride=1, stem_relu=False)


@pytest.mark.parametrize("name", ["resnet18", "resnet18_nl"])
def test_weights_are_loaded_by_name(
    fake: FakeWeights, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    fake.put("V1", "pretrained")
    network = backbone(name)
    with caplog.at_level(logging.INFO):
        load_imagenet_weights(network, fake.weights, fetch=no_network)
    assert f"SHA-256 {hashlib.sha256(fake.content['V1']).hexdigest()}" in caplog.text
    loaded = network.state_dict()
    for key, value in fake.state.items():
        if not key.startswith("fc."):
            assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": None, "fc.bias": None, "bn1.num_batches_tracked": None}, None),
        ({"layer1.0.conv1.weight": None}, "it lacks layer1.0.conv1.weight"),
        ({"layer9.weight": torch.ones(1)}, "the network has no layer9.weight"),
        ({"conv1.weight": torch.ones(64, 1, 7, 7)}, r"conv1.weight has shape \(64, 1, 7, 7\)"),
    ],
)
def test_only_the_head_and_counters_may_differ(
    fake: FakeWeights, change: dict[str, Tensor | None], message: str | None
) -> None:
    fake.remake("V1", change)
    fake.put("V1", "pretrained")
    if message is None:
        load_imagenet_weights(backbone(), fake.weights, fetch=no_network)
    else:
        with pytest.raises(UserError, match=message):
            load_imagenet_weights(backbone(), fake.weights, fetch=no_network)


def test_a_file_that_is_not_a_state_dict_is_named(fake: FakeWeights) -> None:
    fake.content["V1"] = b"not a pickle"
    fake.put("V1", "pretrained")
    with pytest.raises(UserError, match="is not a file of tensors"):
        load_imagenet_weights(backbone(), fake.weights, fetch=no_network)


def test_published_files_are_those_of_torchvision() -> None:
    weights = [design.imagenet for design in REID_DESIGNS.values() if design.imagenet]
    for known in (known for each in weights for known in each.files):
        assert len(known.digest_start) == 8
        if known.torchvision:
            assert torchvision.models.get_weight(known.torchvision).url.endswith(known.name)
