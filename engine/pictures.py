"""Picture grids: what happens to an image on its way, side by side, for human eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from layers.pixels import PixelSpace
from utils.files import atomic_write

_GAP = 4
_BACKGROUND = (255, 255, 255)
_INK = (20, 20, 20)


def picture_grid(
    columns: Mapping[str, Tensor], pixels: PixelSpace, row_names: Sequence[str] = ()
) -> Image.Image:
    """Draw images side by side under the names of their kinds.

    Args:
        columns: For each kind of image the normalised images (B, 3, H, W) of the same B photos.
        pixels: Pixel space of the images; values beyond [0, 1] are clamped for display.
        row_names: A caption for each row, or none.

    Returns:
        RGB picture with one row per photo and one column per kind.

    Raises:
        ValueError: If there is nothing to draw or the columns differ in shape.
    """
    shapes = {tuple(images.shape) for images in columns.values()}
    if len(shapes) != 1:
        raise ValueError(f"columns have shapes {sorted(shapes)}; expected one shape (B, 3, H, W)")
    count, _, height, width = shapes.pop()
    font = ImageFont.load_default(size=12)
    cell = max(width, *(int(font.getlength(name)) for name in columns))
    left = max((int(font.getlength(name)) + 2 * _GAP for name in row_names), default=0)
    top = 20
    size = (
        left + len(columns) * (cell + _GAP) + _GAP,
        top + count * (height + _GAP) + _GAP,
    )
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(columns.items()):
        x = left + _GAP + column * (cell + _GAP)
        draw.text((x + (cell - font.getlength(name)) / 2, 3), name, _INK, font)
        array = pixels.to_uint8(images.cpu()).permute(0, 2, 3, 1).contiguous().numpy()
        for row in range(count):
            y = top + row * (height + _GAP)
            sheet.paste(Image.fromarray(array[row]), (x + (cell - width) // 2, y))
    for row, name in enumerate(row_names):
        draw.text((_GAP, top + row * (height + _GAP) + height / 2 - 6), name, _INK, font)
    return sheet


def save_picture(sheet: Image.Image, path: Path) -> None:
    """Write a PNG atomically; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")


def as_tensor(sheet: Image.Image) -> Tensor:
    """Return a picture as uint8 (3, H, W), as TensorBoard takes it."""
    data = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return data.view(sheet.height, sheet.width, 3).permute(2, 0, 1)
