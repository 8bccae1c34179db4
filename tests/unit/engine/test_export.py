"""Tolerances between exported files and networks, and the metadata of files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import export as parity
from engine.api import Anonymizer, Pixels, find_joint_weights
from engine.checkpoint import official_path
from engine.export import (
    VERBS,
    EmbeddingParity,
    ImageParity,
    ParityError,
    check_parity,
    describe,
    graph_of,
    weights_sha256,
)
from tests.fixtures.exporting import save_random_model
from utils.errors import UserError, optional_package


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("exporting") / "run")


@pytest.fixture
def model(checkpoint: Path) -> Anonymizer:
    return Anonymizer.from_checkpoint(checkpoint, device="cpu", precision="float32")


@pytest.mark.parametrize(
    ("step", "every", "holds"),
    [(0, 1, True), (1, 1000, True), (1, 900, False), (2, 90_000, False), (-1, 1000, True)],
)
def test_few_values_may_differ_by_one_level(step: int, every: int, holds: bool) -> None:
    expected = np.full((10, 100, 30, 3), 100, np.uint8)
    exported = expected.copy()
    exported.reshape(-1)[::every] += np.uint8(step % 256)
    measured = ImageParity.of(exported, expected)
    assert measured.levels == abs(step)
    assert measured.holds is holds


def test_differences_of_levels_do_not_overflow() -> None:
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert ImageParity.of(black, white) == ImageParity(255, 1.0) == ImageParity.of(white, black)


@pytest.mark.parametrize(
    ("moved", "holds"), [(0.0, True), (5e-5, True), (2e-4, False), (np.nan, False)]
)
def test_embeddings_may_differ_by_rounding(moved: float, holds: bool) -> None:
    expected = np.eye(3, 8, dtype=np.float32)
    exported = expected.copy()
    exported[1, 5] += np.float32(moved)
    assert EmbeddingParity.of(exported, expected).holds is holds
    assert EmbeddingParity.of(expected, exported).holds is holds


def test_the_cosine_is_the_smallest_of_all_images() -> None:
    expected = np.eye(3, 8, dtype=np.float32)
    assert EmbeddingParity.of(np.roll(expected, 1, axis=1), expected).cosine == 0


@pytest.mark.parametrize("verb", VERBS)
def test_the_graph_equals_the_api(model: Anonymizer, verb: str) -> None:
    """Before export, on batches of 1, 3 and 8 images."""
    graph = graph_of(verb, model)
    sizes = []

    def run(pixels: Pixels) -> np.ndarray:
        sizes.append(len(pixels))
        with torch.no_grad():
            return np.asarray(graph(torch.from_numpy(pixels)))

    images = parity.sample_images(model)
    assert check_parity(verb, run, model, images).holds
    assert sizes == [1, 3, 8]
    assert graph.shape == (("N", 512) if verb == "embed" else ("N", 64, 32, 3))


def test_sample_images_are_people_noise_black_and_white(model: Anonymizer) -> None:
    images = parity.sample_images(model)
    assert {image.shape for image in images} == {(64, 32, 3)}
    assert {image.dtype for image in images} == {np.dtype(np.uint8)}
    assert (images[-2].max(), images[-1].min()) == (0, 255)
    assert len({image.tobytes() for image in images}) == len(images)


def test_another_shape_or_type_is_an_error(model: Anonymizer) -> None:
    images = parity.sample_images(model)
    with pytest.raises(ParityError, match=r"\(12, 3, 64, 32\) of uint8; the network returns"):
        check_parity("anonymize", lambda x: x.transpose(0, 3, 1, 2), model, images)
    with pytest.raises(ParityError, match="float32"):
        check_parity("anonymize", lambda x: x.astype(np.float32), model, images)


def test_a_network_that_returns_nan_is_named(model: Anonymizer) -> None:
    images = parity.sample_images(model)
    model.networks["embed"].bottleneck.weight.data.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="network itself contains NaN or infinity"):
        check_parity("embed", lambda x: np.zeros((len(x), 512), np.float32), model, images)


@pytest.mark.parametrize("verb", VERBS)
def test_metadata(checkpoint: Path, model: Anonymizer, verb: str) -> None:
    weights = find_joint_weights(checkpoint)
    metadata = describe(verb, graph_of(verb, model), model, weights)
    official = torch.load(official_path(checkpoint, "best", VERBS[verb]), weights_only=True)
    assert metadata["weights_sha256"] == weights_sha256(official)
    assert (metadata["verb"], metadata["epoch"], metadata["checkpoint"]) == (verb, "7", "best")
    assert (metadata["height"], metadata["width"], metadata["channel_order"]) == ("64", "32", "RGB")
    assert json.loads(metadata["mean"]) == [0.45, 0.4, 0.5]
    assert json.loads(metadata["std"]) == [0.5, 0.45, 0.55]
    assert metadata.get("metric") == ("cosine" if verb == "embed" else None)
    assert metadata["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in metadata.values())
    assert str(checkpoint) not in str(metadata)


def test_the_hash_depends_on_names_and_bytes() -> None:
    values = torch.arange(6.0).view(2, 3)
    hashes = {
        weights_sha256({"a": values}),
        weights_sha256({"b": values}),
        weights_sha256({"a": values + 1}),
        weights_sha256({"a": values, "b": values}),
    }
    assert len(hashes) == 4
    assert weights_sha256({"a": values.t().contiguous().t()}) == weights_sha256({"a": values})


def test_a_missing_package_names_the_command() -> None:
    with pytest.raises(UserError, match=r"exporting needs the package nonesuch.*run `pip install"):
        optional_package("nonesuch", "exporting", "pip install nonesuch")


def test_differences_are_described_in_words() -> None:
    assert str(ImageParity(0, 0.0)) == "no value differs"
    assert str(ImageParity(1, 3.3e-5)) == "at most 1 grey level, in 0.0033 % of the values"
    assert str(ImageParity(7, 0.5)) == "at most 7 grey levels, in 50 % of the values"
    text = "at most 2.0e-07 of a coordinate, cosine at least 1 - 0.0e+00"
    assert str(EmbeddingParity(2e-7, 1 + 1e-12)) == text
