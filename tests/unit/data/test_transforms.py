"""Augmentation: equality with a naive loop, distributions, the same draw for both images."""

from __future__ import annotations

import pytest
import torch

from data.transforms import (
    Augmentation,
    AugmentationDraw,
    _erase_by_mask,
    _erase_by_slices,
    _move_by_slices,
    _move_by_windows,
    normalize_batch,
)
from layers.pixels import PixelSpace
from utils.errors import UserError

SPACE = PixelSpace((0.485, 0.456, 0.406), (0.5, 0.4, 0.6))
SIZE = (64, 32)


def _images(count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, *SIZE), generator=generator, dtype=torch.uint8)


def _draw(augmentation: Augmentation, count: int, seed: int = 1) -> AugmentationDraw:
    return augmentation.draw(count, SIZE, torch.Generator().manual_seed(seed))


def _naive(image: torch.Tensor, draw: AugmentationDraw, index: int, padding: int) -> torch.Tensor:
    """Augment one image, pixel by pixel."""
    height, width = SIZE
    top, left = int(draw.top[index]), int(draw.left[index])
    box_top, box_left, box_height, box_width = draw.box[index].tolist()
    result = torch.empty(3, height, width)
    for channel in range(3):
        mean, std = SPACE.mean[channel], SPACE.std[channel]
        for y in range(height):
            for x in range(width):
                source_y, source_x = y + top - padding, x + left - padding
                inside = 0 <= source_y < height and 0 <= source_x < width
                if draw.flip[index]:
                    source_x = width - 1 - source_x
                value = int(image[channel, source_y, source_x]) if inside else 0
                result[channel, y, x] = (value / 255 - mean) / std
                if 0 <= y - box_top < box_height and 0 <= x - box_left < box_width:
                    result[channel, y, x] = mean
    return result


def test_equals_a_naive_loop_over_pixels():
    augmentation = Augmentation(SPACE, flip_probability=0.5, padding=10, erase_probability=0.7)
    images = _images(3)
    draw = _draw(augmentation, 3, seed=4)
    assert draw.flip.any()
    assert not draw.flip.all()
    assert (draw.box[:, 2] > 0).any()
    result = augmentation(images, draw)
    expected = torch.stack([_naive(images[i], draw, i, 10) for i in range(3)])
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("padding", [0, 1, 10, 40, 90])
def test_cpu_and_gpu_implementations_agree(padding):
    augmentation = Augmentation(SPACE, padding=padding)
    images, draw = _images(9), _draw(augmentation, 9)
    moved = _move_by_slices(images, draw, padding)
    assert torch.equal(moved, _move_by_windows(images, draw, padding))
    fill = torch.tensor(SPACE.mean).view(3, 1, 1)
    normalised = SPACE.normalize(moved)
    by_mask = _erase_by_mask(normalised, draw.box, fill)
    by_slices = _erase_by_slices(normalised.clone(), draw.box, fill)
    assert torch.equal(by_slices, by_mask)
    assert torch.equal(augmentation(images, draw), by_mask)


def test_both_images_get_the_same_draw():
    augmentation = Augmentation(SPACE, erase_probability=1.0)
    images, draw = _images(), _draw(augmentation, 6)
    result, repeated = augmentation(images, draw), augmentation(images.clone(), draw)
    assert torch.equal(result, repeated)
    other = augmentation(255 - images, draw)
    erased = (result == torch.tensor(SPACE.mean).view(3, 1, 1)).all(1)
    assert torch.equal(erased, (other == torch.tensor(SPACE.mean).view(3, 1, 1)).all(1))


def test_padding_is_black_and_erasing_is_the_mean_in_normalised_space():
    augmentation = Augmentation(SPACE, flip_probability=0.0, padding=10, erase_probability=0.0)
    white = torch.full((1, 3, *SIZE), 255, dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.int64)
    box = torch.tensor([[30, 12, 5, 7]])
    result = augmentation(white, AugmentationDraw(zero.bool(), zero, zero, box))[0]
    black = SPACE.normalize(torch.zeros(3, 1, 1)).flatten()
    torch.testing.assert_close(result[:, 0, 0], black)
    assert torch.equal(result[:, 32, 14], torch.tensor(SPACE.mean))
    assert torch.equal(result[:, 10:, 10:].isclose(torch.tensor(SPACE.mean).view(3, 1, 1)).all(0),
                       torch.zeros(54, 22, dtype=torch.bool).index_put(
                           (torch.arange(20, 25)[:, None], torch.arange(2, 9)[None]),
                           torch.tensor(True)))  # fmt: skip


def test_without_augmentation_images_are_only_normalised():
    augmentation = Augmentation(SPACE, flip_probability=0.0, padding=0, erase_probability=0.0)
    images = _images()
    result = augmentation(images, _draw(augmentation, 6))
    assert torch.equal(result, SPACE.normalize(images))
    assert torch.equal(result, normalize_batch(images, SPACE))


def test_draws_have_the_published_distributions():
    size = (256, 128)
    draw = Augmentation(SPACE).draw(20_000, size, torch.Generator().manual_seed(0))
    assert abs(draw.flip.float().mean() - 0.5) < 0.015
    for corner in (draw.top, draw.left):
        assert (int(corner.min()), int(corner.max())) == (0, 20)
        assert (corner.bincount(minlength=21) / 20_000 - 1 / 21).abs().max() < 0.008
    top, left, height, width = draw.box.unbind(1)
    erased = height > 0
    assert abs(erased.float().mean() - 0.5) < 0.015
    assert not draw.box[~erased].any()
    top, left, height, width = draw.box[erased].unbind(1)
    area = (height * width) / (size[0] * size[1])
    assert 0.019 < area.min() < 0.022
    assert 0.38 < area.max() < 0.405
    aspect = height / width
    assert 0.28 < aspect.min() < 0.32
    assert 3.2 < aspect.max() < 3.45
    assert (height < size[0]).all()
    assert (width < size[1]).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    assert (top + height == size[0]).any()  # the last position occurs
    assert (top == 0).any()


def test_nothing_is_erased_if_no_rectangle_fits():
    draw = Augmentation(SPACE, erase_probability=1.0).draw(50, (1, 400), torch.Generator())
    assert not draw.box[:, 2:].any()


def test_a_slice_of_a_draw_augments_the_same_images_equally():
    augmentation = Augmentation(SPACE)
    images, draw = _images(8), _draw(augmentation, 8)
    whole = augmentation(images, draw)
    part = slice(3, 6)
    assert torch.equal(augmentation(images[part], draw[part]), whole[part])
    moved = draw.to(torch.device("cpu"))
    assert torch.equal(augmentation(images, moved), whole)


@pytest.mark.parametrize(
    "options", [{"flip_probability": 1.5}, {"erase_probability": -0.1}, {"padding": -1}]
)
def test_values_out_of_range_are_an_error(options):
    with pytest.raises(UserError, match="; expected 0 "):
        Augmentation(SPACE, **options)
