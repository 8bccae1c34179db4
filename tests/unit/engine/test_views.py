"""Image grids: every cell shows its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.views import as_tensor, image_grid, save_image
from layers.pixels import PixelSpace

PIXELS = PixelSpace((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))


def _cells(grid: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(grid) == colour).all(-1)


def test_every_image_is_in_its_row_and_column() -> None:
    colours = torch.tensor([[10, 20, 30], [200, 100, 50]], dtype=torch.uint8)
    raw = colours.view(2, 3, 1, 1).expand(2, 3, 40, 100)
    columns = {
        "raw": PIXELS.normalize(raw),
        "recovered": PIXELS.normalize((255 - raw.int()).to(torch.uint8)),
    }
    grid = image_grid(columns, PIXELS)
    corners = []
    for colour in (*colours.tolist(), *(255 - colours.int()).tolist()):
        rows, columns_of = np.nonzero(_cells(grid, tuple(colour)))
        assert len(rows) == 40 * 100
        corners.append((rows.min(), columns_of.min()))
    (first, second, third, fourth) = corners
    assert first[0] == third[0] < second[0] == fourth[0]  # a row for each image
    assert first[1] == second[1] < third[1] == fourth[1]  # a column for each kind


def test_values_beyond_the_range_are_clamped() -> None:
    bright = PIXELS.normalize(torch.full((1, 3, 32, 64), 1.0)) + 9
    dark = PIXELS.normalize(torch.zeros(1, 3, 32, 64)) - 9
    grid = image_grid({"a": bright, "b": dark}, PIXELS)
    assert _cells(grid, (0, 0, 0)).sum() >= 32 * 64
    assert _cells(grid, (255, 255, 255)).sum() >= 32 * 64


def test_row_names_make_the_grid_wider() -> None:
    columns = {"raw": torch.zeros(2, 3, 32, 32)}
    plain = image_grid(columns, PIXELS)
    named = image_grid(columns, PIXELS, ("without upgradation", "full"))
    assert named.width > plain.width
    assert named.height == plain.height


def test_small_images_are_enlarged_and_captions_have_lines() -> None:
    white = {"sealed\n(aead)": PIXELS.normalize(torch.full((1, 3, 64, 32), 255, dtype=torch.uint8))}
    grid = image_grid(white, PIXELS)
    assert _cells(grid, (255, 255, 255)).sum() >= 9 * 64 * 32
    one_line = image_grid({"sealed": next(iter(white.values()))}, PIXELS)
    assert grid.height > one_line.height
    assert grid.width == one_line.width


def test_columns_have_one_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        image_grid({"a": torch.zeros(1, 3, 8, 8), "b": torch.zeros(2, 3, 8, 8)}, PIXELS)
    with pytest.raises(ValueError, match="one shape"):
        image_grid({}, PIXELS)


def test_a_grid_is_saved_and_converted_unchanged(tmp_path: Path) -> None:
    grid = image_grid({"raw": torch.linspace(-1, 1, 3 * 64 * 32).view(1, 3, 64, 32)}, PIXELS)
    save_image(grid, tmp_path / "pictures" / "epoch_001.png")
    with Image.open(tmp_path / "pictures" / "epoch_001.png") as read:
        assert np.array_equal(np.asarray(read), np.asarray(grid))
    tensor = as_tensor(grid)
    assert tensor.dtype == torch.uint8
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(grid))
