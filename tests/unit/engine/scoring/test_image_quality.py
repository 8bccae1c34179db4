"""PSNR and SSIM against golden values and the definition as a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.scoring import image_quality
from engine.scoring.image_quality import (
    QualityAccumulator,
    mean_squared_error,
    structural_similarity,
)
from tests.fixtures.paths import GOLDEN
from utils.errors import UserError


def images(count=5, height=20, width=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(count, 3, height, width, generator=generator)
    return raw, raw + 0.3 * torch.randn(raw.shape, generator=generator)


def naive_ssim(raw, image):
    """One window position at a time, in float64."""
    raw, image = raw.double().numpy(), image.double().numpy()
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    pad = ((0, 0), (0, 0), (5, 5), (5, 5))
    raw, image = np.pad(raw, pad), np.pad(image, pad)
    height, width = raw.shape[2] - 10, raw.shape[3] - 10
    values = np.zeros((*raw.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            x, y = (one[:, :, i : i + 11, j : j + 11] for one in (raw, image))
            mean_x, mean_y = (x * window).sum((2, 3)), (y * window).sum((2, 3))
            var_x = (x**2 * window).sum((2, 3)) - mean_x**2
            var_y = (y**2 * window).sum((2, 3)) - mean_y**2
            cov = (x * y * window).sum((2, 3)) - mean_x * mean_y
            values[:, :, i, j] = (
                (2 * mean_x * mean_y + 1e-4)
                * (2 * cov + 9e-4)
                / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
            )
    return values.mean((1, 2, 3))


def quality(raw, image, sizes):
    accumulator = QualityAccumulator()
    for one, other in zip(raw.split(sizes), image.split(sizes), strict=True):
        accumulator.update(one, other)
    return accumulator


@pytest.mark.parametrize("name", ["mosaic", "blur", "noisy"])
def test_golden_values(name):
    file = np.load(GOLDEN / "images.npz")

    def picture(array):
        return torch.tensor(array).permute(2, 0, 1)[None] / 255

    key = {"mosaic": "mosaic_24", "blur": "gaussian_blur_12_pillow"}.get(name)
    image = torch.tensor(file["noisy"]) if key is None else picture(file[key])
    result = quality(picture(file["image"]), image, 1).result()
    assert result.psnr_db == pytest.approx(float(file[f"psnr_{name}"]), abs=1e-4)
    assert result.ssim == pytest.approx(float(file[f"ssim_{name}"]), abs=1e-4)


@pytest.mark.parametrize(("height", "width"), [(20, 13), (4, 30), (11, 11)])
def test_ssim_equals_the_definition(height, width):
    raw, image = images(3, height, width)
    np.testing.assert_allclose(structural_similarity(raw, image), naive_ssim(raw, image), atol=1e-5)


def test_psnr_is_pooled_before_the_logarithm():
    raw = torch.zeros(2, 3, 4, 4)
    image = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.3)])
    result = quality(raw, image, 1)
    assert result.result().psnr_db == pytest.approx(-10 * np.log10(0.05), abs=1e-5)
    np.testing.assert_allclose(result.per_image()[0], [20, -20 * np.log10(0.3)], atol=1e-5)


def test_batching_changes_nothing(monkeypatch):
    raw, image = images(7)
    whole = quality(raw, image, 7)
    for sizes, block in ((1, 2**17), (3, 2**17), (7, 1), (4, 2 * raw[0].numel())):
        monkeypatch.setitem(image_quality._BLOCK_VALUES, "cpu", block)
        other = quality(raw, image, sizes)
        assert other.result().psnr_db == pytest.approx(whole.result().psnr_db, abs=1e-6)
        assert other.result().ssim == pytest.approx(whole.result().ssim, abs=1e-7)
        torch.testing.assert_close(other.per_image()[1], whole.per_image()[1])
    assert len(whole) == 7


def test_images_of_other_sizes_weigh_by_their_pixels():
    small, large = images(1, 8, 8), images(1, 16, 16)
    accumulator = QualityAccumulator()
    accumulator.update(*small)
    accumulator.update(*large)
    pooled = torch.cat([(one[0] - one[1]).square().flatten() for one in (small, large)]).mean()
    assert accumulator.result().psnr_db == pytest.approx(-10 * np.log10(pooled.item()), abs=1e-5)


def test_identical_images():
    raw, _ = images(2)
    result = quality(raw, raw, 2).result()
    assert result.psnr_db == float("inf")
    assert result.ssim == pytest.approx(1.0, abs=1e-6)


def test_autocast_and_half_precision_are_measured_in_float32():
    raw, image = images()
    expected = structural_similarity(raw, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(structural_similarity(raw, image), expected, rtol=0, atol=0)
    half = image.bfloat16()
    assert structural_similarity(raw, half).dtype == torch.float32
    assert mean_squared_error(raw, half).dtype == torch.float32


def test_similarity_has_gradients_even_after_inference_mode():
    raw, image = images(1, 17, 19)
    with torch.inference_mode():
        structural_similarity(raw, image)
    image.requires_grad_()
    structural_similarity(raw, image).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_misuse_is_refused():
    raw, image = images()
    with pytest.raises(UserError, match="of one shape"):
        QualityAccumulator().update(raw, image[:2])
    with pytest.raises(UserError, match="floating-point values"):
        QualityAccumulator().update((raw * 255).byte(), image)
    with pytest.raises(UserError, match="no image was added"):
        QualityAccumulator().result()
    scores = QualityAccumulator()
    scores.update(raw, image.masked_fill(image > 0.9, torch.nan))
    with pytest.raises(UserError, match="contain NaN"):
        scores.result()
