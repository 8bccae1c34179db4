"""Additions as docs/EXTENDING.md describes them are trained, scored and attacked.

An added data set, desensitizer, backbone, loss and cipher each consist of a class or function and
one registry line, here in ``_added``; a loss also has a weight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import defaults, loading
from configs.schema import Key, Number
from data.datasets.layout import SUBSETS, LoadedData, LoadRequest, list_images, subject_of
from data.desensitize import DESENSITIZERS, Desensitizer
from data.records import DatasetSplits, Sample
from data.registry import DATASETS
from engine.attacks.measures import HOLDS
from engine.attacks.suite import ATTACKS
from layers.blocks import AveragePooling, Backbone
from modeling.backbones.registry import REID_DESIGNS, ReIDDesign
from modeling.build import CIPHERS, build_cipher, build_objectives, build_reid
from modeling.encryption.cipher import (
    Sealed,
    check_batch,
    dequantize_pixels,
    quantize_pixels,
    read_sealed,
)
from modeling.encryption.ised_errors import MissingKey, WrongKey
from modeling.encryption.primitives import (
    EvaluationKeys,
    KeyOf,
    SubjectKey,
    existing_message_key,
    open_sealed,
    random_key,
    seal,
)
from modeling.objectives import GENERATOR_TERMS, GeneratorInput, Objectives
from tests.fixtures import tiny, trees
from tests.fixtures.attack_scene import install_small_restorer, make_scene
from utils.errors import UserError


def load_crowd(request: LoadRequest) -> LoadedData:
    """Load images ``crowd/<subset>/<pid>-<camera>-<number>.png``."""
    folder, parts = request.root / "crowd", {}
    for subset in SUBSETS:
        side, samples = "test" if subset in ("query", "gallery") else "train", []
        for path in list_images(folder / subset):
            pid, camera, _ = map(int, path.stem.split("-"))
            samples.append(Sample(str(path), pid, camera, subject_of("crowd", side, pid)))
        parts[subset] = tuple(samples)
    return LoadedData(DatasetSplits(request.name, **parts), "Crowd", "folders", folder)


class Negative(Desensitizer):
    """Return the negative of an image."""

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        return 255 - images

    def _problem(self) -> str:
        return ""


class PatchBackbone(Backbone):
    """One convolution over patches, like the first layer of a vision transformer."""

    out_channels = 12

    def __init__(self, *, last_stride: int, stem_relu: bool) -> None:
        super().__init__()
        if last_stride != 1 or stem_relu:
            raise UserError("this backbone expects MODEL.LAST_STRIDE 1 and MODEL.STEM_RELU False")
        self.patches = nn.Conv2d(3, self.out_channels, 8, stride=8)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.patches(image)
        return out


class BoxKeys:
    """One key for each subject; opening tries all keys."""

    def __init__(self) -> None:
        self._keys: dict[str, bytes] = {}
        self._decoy = random_key()

    def sealing_key(self, subject: str) -> SubjectKey:
        return SubjectKey(b"", self._keys.setdefault(subject, random_key()))

    def opening_key(self, header: bytes) -> bytes:
        for key in self._keys.values():
            try:
                existing_message_key(key, "box", header[:32], header[32:64])
            except WrongKey:
                continue
            return key
        raise MissingKey("no key matches this header")

    def another_key(self, header: bytes) -> bytes:
        own = self.opening_key(header)
        return next((key for key in self._keys.values() if key != own), self._decoy)


class BoxCipher:
    """A secure cipher with another file format: the header is salt, commitment and tag."""

    name: ClassVar[str] = "box"
    secure: ClassVar[bool] = True
    caution: ClassVar[str] = ""

    def __init__(self) -> None:
        self._keys = BoxKeys()

    @property
    def keys(self) -> EvaluationKeys:
        return self._keys

    def quantize(self, images: Tensor) -> Tensor:
        return dequantize_pixels(quantize_pixels(images))

    def seal(self, images: Tensor, subjects: Sequence[str]) -> Sealed:
        check_batch(images, subjects)
        pixels, headers = quantize_pixels(images).cpu().numpy(), []
        for image, subject in zip(pixels, subjects, strict=True):
            key = self._keys.sealing_key(subject).key
            box = seal(key, "box", repr(image.shape).encode(), image.tobytes())
            image[:] = np.frombuffer(box[64:-16], np.uint8).reshape(image.shape)
            headers.append(box[:64] + box[-16:])
        return Sealed(torch.from_numpy(pixels), tuple(headers), images.device)

    def open(self, sealed: Sealed, key_of: KeyOf) -> Tensor:
        pixels = sealed.payload.numpy().copy()
        for image, header in zip(pixels, sealed.headers, strict=True):
            box = header[:64] + image.tobytes() + header[64:]
            plain = open_sealed(key_of(header), "box", repr(image.shape).encode(), box)
            image[:] = np.frombuffer(plain, np.uint8).reshape(image.shape)
        return dequantize_pixels(torch.from_numpy(pixels).to(sealed.device))

    def observe(self, sealed: Sealed) -> Tensor:
        return dequantize_pixels(sealed.payload.to(sealed.device))


def mean_colour_loss(batch: GeneratorInput, _: Objectives) -> Tensor:
    """Return the mean squared difference of the mean colours of recovered and raw images."""
    recovered, raw = (images.float().mean((2, 3)) for images in (batch.out.recovered, batch.raw))
    return (recovered - raw).square().mean()


WEIGHT = Key("LOSS.MEAN_COLOUR", 2.5, Number(low=0), "weight of the difference of mean colours")
ADDED = (
    "DATASETS.NAMES", "crowd", "INPUT.TYPE", "negative", "MODEL.NAME", "patches",
    "ISED.SCHEME", "box",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "crowd", load_crowd)
    monkeypatch.setitem(DESENSITIZERS, "negative", Negative)
    monkeypatch.setitem(REID_DESIGNS, "patches", ReIDDesign(PatchBackbone, AveragePooling))
    monkeypatch.setitem(CIPHERS, "box", BoxCipher)
    monkeypatch.setitem(GENERATOR_TERMS, "mean_colour", (mean_colour_loss, ("LOSS.MEAN_COLOUR",)))
    monkeypatch.setitem(defaults.KEY_BY_NAME, WEIGHT.name, WEIGHT)
    for module in (defaults, loading):
        monkeypatch.setattr(module, "KEYS", (*defaults.KEYS, WEIGHT))


@pytest.fixture
def crowd(tmp_path: Path) -> Path:
    """Write the data set of ``load_crowd``: 4 training, 2 validation and 2 test identities."""
    for subset in SUBSETS:
        for pid in range(4) if subset == "train" else (4, 5) if "val" in subset else (6, 7):
            for camera in (0, 1):
                for number in (0, 1):
                    name = f"{pid}-{camera}-{number}.png"
                    trees.save(tmp_path / "crowd" / subset / name, subset, name)
    return tmp_path


def test_additions_are_trained_scored_and_loaded_again(crowd: Path) -> None:
    places = ("DATASETS.ROOT_DIR", str(crowd), *ADDED)
    run = tiny.run(crowd, *places, *tiny.PERMISSIVE)
    result = tiny.results(run)
    assert result["dataset"] == "crowd"
    assert result["notes"]["encryption"] == "box"
    assert tiny.native(run)["epoch"] == 2
    assert any("loss/mean_colour" in line for line in tiny.losses(run))

    choice = ("MODEL.PRETRAIN_CHOICE", "self", "MODEL.PRETRAIN_DIR", str(run))
    again = (*choice, "TEST.EVALUATE_ONLY", "on", "EVAL.SPLIT", "val")
    alone = tiny.results(tiny.run(crowd, *places, *again, output="alone"))
    for first, second in zip(result["retrieval"], alone["retrieval"], strict=True):
        if first["key"] in ("none", "right"):  # ciphertexts differ: each run draws new keys
            assert first == second


def test_the_weight_of_an_added_loss_is_a_key(
    make_cfg: Callable[..., CfgNode],
) -> None:
    assert build_objectives(make_cfg(), 3, 12).weights["mean_colour"] == 2.5
    other = make_cfg("LOSS.MEAN_COLOUR", "0.5")
    assert build_objectives(other, 3, 12).weights["mean_colour"] == 0.5


def test_a_backbone_without_imagenet_weights_starts_from_random_ones(
    make_cfg: Callable[..., CfgNode],
) -> None:
    own = ("MODEL.NAME", "patches", "MODEL.PRETRAIN_CHOICE")
    assert build_reid(make_cfg(*own, "none"), 3).feature_size == 12
    with pytest.raises(UserError, match="MODEL.NAME patches, for which there are no ImageNet"):
        build_reid(make_cfg(*own, "imagenet"), 3)


def test_an_added_cipher_opens_what_it_sealed(make_cfg: Callable[..., CfgNode]) -> None:
    cipher = build_cipher(make_cfg("ISED.SCHEME", "box"))
    images = 2 * torch.rand(3, 3, 8, 4) - 1
    sealed = cipher.seal(images, ["s/test/1", "s/test/2", "s/test/1"])
    assert torch.equal(cipher.open(sealed, cipher.keys.opening_key), cipher.quantize(images))
    assert read_sealed(cipher, sealed, "wrong").num_refused == 3


# reid-tuned trains re-ID networks, which this scene does not have.
@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"brute-force", "reid-tuned"}))
def test_an_added_cipher_is_attacked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", random.Random(1).randbytes)
    install_small_restorer(monkeypatch)
    assert ATTACKS[name].reason_against("box") == ""
    assert ATTACKS[name].run(make_scene(), "box").result.verdict == HOLDS


def test_brute_force_skips_a_cipher_without_a_way_to_guess_keys() -> None:
    assert "brute_force.GUESSES" in ATTACKS["brute-force"].reason_against("box")
