"""The normalised pixel space."""

from __future__ import annotations

import pickle

import pytest
import torch

from layers.pixels import PixelSpace
from utils.errors import UserError

SPACE = PixelSpace((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))


def all_bytes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256).clone()


def test_every_byte_survives_the_round_trip() -> None:
    assert torch.equal(SPACE.to_uint8(SPACE.normalize(all_bytes())), all_bytes())


def test_bytes_and_unit_floats_agree() -> None:
    image = all_bytes()
    torch.testing.assert_close(SPACE.normalize(image), SPACE.normalize(image.double() / 255))
    torch.testing.assert_close(SPACE.denormalize(SPACE.normalize(image)), image.float() / 255)


def test_normalised_range_is_that_of_each_channel() -> None:
    values = SPACE.normalize(torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2))
    expected = torch.tensor([[-0.97, 1.03], [-0.912, 1.088], [-0.812, 1.188]])
    torch.testing.assert_close(values[0, :, 0], expected)


def test_inputs_are_left_alone() -> None:
    unit, image = torch.rand(1, 3, 2, 2), all_bytes()
    before, image_before = unit.clone(), image.clone()
    SPACE.denormalize(SPACE.normalize(unit))
    SPACE.to_uint8(unit)
    SPACE.normalize(image)
    assert torch.equal(unit, before)
    assert torch.equal(image, image_before)


def test_outside_values_are_kept_until_they_become_bytes() -> None:
    image = torch.full((1, 3, 1, 1), 2.0)
    assert (SPACE.denormalize(image) > 1).all()
    assert (SPACE.to_uint8(image) == 255).all()


def test_memory_format_is_kept() -> None:
    image = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert SPACE.normalize(image).is_contiguous(memory_format=torch.channels_last)


def test_gradient_flows() -> None:
    image = torch.rand(1, 3, 2, 2, requires_grad=True)
    SPACE.denormalize(image).sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(image.grad, torch.full((1, 3, 2, 2), 0.5))


def test_equality_and_pickling() -> None:
    SPACE.normalize(all_bytes())
    assert pickle.loads(pickle.dumps(SPACE)) == SPACE  # noqa: S301
    assert hash(PixelSpace(SPACE.mean, SPACE.std)) == hash(SPACE)
    assert PixelSpace((0, 0, 0), (1, 1, 1)) != SPACE


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0, 0), (1, 1, 1)),
        ((0, 0, 0), (1, 0, 1)),
        ((0, 0, 0), (1, float("nan"), 1)),
        (("x", 0, 0), (1, 1, 1)),
        ((10**400, 0, 0), (1, 1, 1)),
    ],
)
def test_impossible_constants_are_errors(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="mean and standard deviation of pixels"):
        PixelSpace(mean, std)
