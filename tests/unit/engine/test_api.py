"""anonymize, recover and embed on PIL images and arrays, one or many."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from yacs.config import CfgNode

from engine.api import Anonymizer
from engine.checkpoint import read_native, save_official
from engine.model import build_model
from tests.fixtures.protection import save_checkpoint
from utils.errors import UserError

_MODELS: list[Anonymizer] = []  # loaded once: no test changes it


@pytest.fixture
def model(make_cfg: Callable[..., CfgNode], tmp_path: Path) -> Anonymizer:
    if not _MODELS:
        save_checkpoint(make_cfg, tmp_path)
        _MODELS.append(Anonymizer.from_checkpoint(tmp_path, device="cpu", precision="float32"))
    return _MODELS[0]


def _array(seed: int = 0, size: tuple[int, int] = (50, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def test_results_have_the_type_of_the_arguments(model: Anonymizer) -> None:
    array, image = _array(), Image.fromarray(_array())
    one = model.anonymize(array)
    assert one.shape == (64, 32, 3)
    assert one.dtype == np.uint8
    drawn = model.anonymize(image)
    assert isinstance(drawn, Image.Image)
    assert np.array_equal(np.asarray(drawn), one)
    many = model.anonymize([image, image])
    assert isinstance(many, list)
    assert np.array_equal(np.asarray(many[1]), one)
    assert model.recover(drawn).size == (32, 64)
    assert model.anonymize([]) == []


def test_anonymize_is_the_network_on_the_training_preprocessing(model: Anonymizer) -> None:
    image = Image.fromarray(_array())
    resized = np.asarray(image.resize((32, 64), Image.Resampling.BILINEAR))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.pixels.mean, model.pixels.std))
    x = (torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.no_grad():
        expected = model.pixels.to_uint8(model._anonymizer(x))[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(model.anonymize(image)).astype(int) - expected).max() <= 1


def test_exif_orientation_is_applied(model: Anonymizer) -> None:
    upright = Image.fromarray(_array())
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6  # "turn me by 90 degrees clockwise to see me upright"
    assert np.array_equal(model.resized(turned), model.resized(upright))


def test_embeddings_are_unit_vectors(model: Anonymizer) -> None:
    embeddings = model.embed([_array(index) for index in range(70)])  # more than one batch
    assert embeddings.shape == (70, 512)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert model.embed(_array(3)).shape == (1, 512)
    np.testing.assert_allclose(model.embed(_array(3))[0], embeddings[3], atol=1e-4)


@pytest.mark.parametrize("full", [RuntimeError("CUDA out of memory. Tried"), MemoryError()])
def test_batches_that_do_not_fit_are_halved(
    model: Anonymizer, monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    images = [_array(seed) for seed in range(11)]
    expected, vectors = model.anonymize(images), model.embed(images)
    sizes = []
    whole = model._normalized

    def normalized(pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 3:
            raise full
        return whole(pixels)

    monkeypatch.setattr(model, "_normalized", normalized)
    assert all(map(np.array_equal, model.anonymize(images), expected))
    assert sizes == [11, 5, 2, 2, 2, 2, 2, 1]
    assert np.allclose(model.embed(images), vectors, atol=1e-6)
    monkeypatch.setattr(model, "_normalized", lambda pixels: normalized(pixels.repeat(9, 1, 1, 1)))
    with pytest.raises(type(full)):
        model.anonymize(images)


def test_grey_images_are_converted_and_other_types_refused(model: Anonymizer) -> None:
    assert model.anonymize(Image.new("L", (10, 20))).mode == "RGB"
    with pytest.raises(UserError, match=r"\(50, 30\) of float64"):
        model.anonymize(np.zeros((50, 30)))  # type: ignore[type-var]
    with pytest.raises(UserError, match="got a str"):
        model.anonymize(["a.png"])  # type: ignore[type-var]
    with pytest.raises(UserError, match="at least one"):
        model.embed([])
    for wrong in ("a.png", Path("a.png"), None):
        for step in (model.anonymize, model.embed):
            with pytest.raises(UserError, match=f"got a {type(wrong).__name__}; .* a list of them"):
                step(wrong)  # type: ignore[operator]


def test_a_tuple_is_accepted_like_a_list(model: Anonymizer) -> None:
    pair = (_array(0), _array(1))
    for one, other in zip(model.anonymize(pair), model.anonymize(list(pair)), strict=True):  # type: ignore[type-var]
        np.testing.assert_array_equal(one, other)
    assert model.embed(pair).shape == (2, 512)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_are_refused(model: Anonymizer, dtype: type[np.generic]) -> None:
    with pytest.raises(UserError, match="mode .* 8 bits a channel"):
        model.anonymize(Image.fromarray(np.full((20, 10), 40_000, dtype)))


def test_broken_exif_is_ignored(model: Anonymizer, tmp_path: Path) -> None:
    """Orientation 6 and a width that is text, which Pillow cannot write back after rotating."""
    entries = struct.pack("<HHHI4sHHIHHI", 2, 0x0100, 2, 2, b"w", 0x0112, 3, 1, 6, 0, 0)
    image = Image.fromarray(_array(size=(20, 10)))
    image.save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\x08\0\0\0" + entries)
    with Image.open(tmp_path / "a.png") as opened:
        np.testing.assert_array_equal(model.resized(opened), model.resized(image))


def test_baseline_and_missing_checkpoints_are_refused(
    make_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        Anonymizer.from_checkpoint(tmp_path / "nothing")
    baseline = tmp_path / "base"
    baseline.mkdir()
    nets = build_model(make_cfg("MODEL.MODE", "C", "MODEL.PRETRAIN_CHOICE", "none"), 5).nets
    save_official(baseline, "latest", nets.official_networks)
    with pytest.raises(UserError, match="no network G, G_R"):
        Anonymizer.from_checkpoint(baseline)


def test_float32_does_not_use_tf32(model: Anonymizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("engine.api.exact_convolutions", lambda: seen.append(1) or nullcontext())
    pixels = torch.from_numpy(_array(size=(64, 32)))[None]
    model.embed_tensor(model.recover_tensor(model.anonymize_tensor(pixels)))
    assert len(seen) == 3


def test_loading_sets_every_weight_and_draws_nothing(
    make_cfg: Callable[..., CfgNode], tmp_path: Path
) -> None:
    """Start values would be replaced by the weights; drawing them takes as long as reading."""
    save_checkpoint(make_cfg, tmp_path)
    stored = read_native(tmp_path, "latest")["networks"]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = Anonymizer.from_checkpoint(tmp_path, device="cpu", precision="float32")
    assert torch.equal(torch.get_rng_state(), before)
    for letter, verb in (("G", "anonymize"), ("G_R", "recover"), ("C", "embed")):
        state = model.networks[verb].state_dict()
        assert state.keys() == stored[letter].keys()
        assert all(torch.equal(value, stored[letter][name]) for name, value in state.items())
