"""Backgrounds: a wide image of a street, park or building for each camera, drawn once."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data.people.raster import Array

Colour = tuple[int, int, int]

STRIP = (720, 320)  # pixels; the background of an image is a part of it
BOUNDARY = 190  # row where the ground begins


def draw_scene(kind: str, rng: np.random.Generator) -> Image.Image:
    """Draw the background of a camera.

    Returns:
        RGB image of size ``STRIP``.
    """
    image = Image.new("RGB", STRIP)
    SCENES[kind](image, ImageDraw.Draw(image), rng)
    grain = 3 * _noise(rng, 3) + 8 * _noise(rng, 60)
    pixels = np.asarray(image, np.float32) + grain[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1.1))


def _noise(rng: np.random.Generator, cell: int) -> Array:
    """Return smooth noise of about unit deviation with features of ``cell`` pixels."""
    width, height = STRIP
    small = rng.normal(0, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize(STRIP, Image.Resampling.BICUBIC))


def _jitter(rng: np.random.Generator, colour: Colour, amount: float = 14) -> Colour:
    """Vary a colour, its brightness more than its hue."""
    change = rng.normal(0, amount) + rng.normal(0, 0.4 * amount, 3)
    shifted = np.clip(np.asarray(colour) + change, 0, 255)
    return (int(shifted[0]), int(shifted[1]), int(shifted[2]))


def _goods(rng: np.random.Generator) -> Colour:
    """Return a random colour for packages, posters and cars."""
    red, green, blue = (int(c) for c in rng.uniform(50, 220, 3))
    return (red, green, blue)


def _shaded(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(min(255, c * factor)) for c in colour)
    return (red, green, blue)


def _ground(
    image: Image.Image,
    colour: Colour,
    *,
    slab: float,
    joint: float,
    rng_shift: float,
    alternate: float = 1.0,
) -> None:
    """Draw paving in perspective, with slabs of ``slab`` metres and darker joints."""
    width, height = STRIP
    rows = np.arange(height - BOUNDARY, dtype=np.float32)[:, None]
    distance = 260.0 / (rows + 46.0)
    sideways = (np.arange(width, dtype=np.float32) - width / 2 + rng_shift) * distance / 150.0
    columns, lines = sideways / slab, np.broadcast_to(distance * 2.2 / slab, (len(rows), width))
    gap = 0.05 + 0.012 * distance
    joints = (columns % 1 < gap) | (lines % 1 < gap * 1.6)
    shade = np.where(joints, joint, 1.0)
    shade = shade * np.where((np.floor(columns) + np.floor(lines)) % 2 == 0, alternate, 1.0)
    shade = shade * (0.86 + 0.2 * rows / rows.max())
    pixels = np.asarray(colour, np.float32) * shade[..., None]
    paved = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.paste(paved, (0, BOUNDARY))


def _plaza(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    wall = _jitter(rng, (176, 164, 146))
    draw.rectangle((0, 0, STRIP[0], BOUNDARY), fill=wall)
    glass = _jitter(rng, (74, 90, 108))
    for x in range(int(rng.integers(10, 40)), STRIP[0], 84):
        for top in (-30, 66):
            shade = _shaded(glass, float(rng.uniform(0.7, 1.4)))
            draw.rectangle((x - 4, top - 4, x + 50, top + 82), fill=_shaded(wall, 1.18))
            draw.rectangle((x, top, x + 46, top + 76), fill=shade)
            draw.line((x + 23, top, x + 23, top + 76), fill=_shaded(wall, 0.9), width=3)
            draw.polygon([(x, top + 40), (x + 30, top), (x + 44, top)], fill=_shaded(shade, 1.2))
    draw.rectangle((0, BOUNDARY - 26, STRIP[0], BOUNDARY), fill=_shaded(wall, 0.62))
    _ground(image, _jitter(rng, (158, 154, 148)), slab=0.62, joint=0.78, rng_shift=7)


def _park(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, STRIP[0], 90), fill=(186, 208, 224))
    draw.rectangle((0, 34, STRIP[0], BOUNDARY), fill=(38, 60, 34))
    for _ in range(760):  # foliage; near leaves last
        x, y = rng.uniform(-20, STRIP[0]), rng.uniform(-20, BOUNDARY - 40)
        size = rng.uniform(8, 24)
        leaf = _jitter(rng, (58, 92, 46), 16)
        draw.ellipse((x, y, x + size, y + size * 0.8), fill=_shaded(leaf, 0.6 + 0.7 * y / BOUNDARY))
    for x in rng.uniform(0, STRIP[0], 7):
        draw.rectangle((x, 40, x + rng.uniform(10, 20), BOUNDARY), fill=_jitter(rng, (76, 60, 46)))
    draw.rectangle((0, BOUNDARY - 44, STRIP[0], BOUNDARY), fill=_jitter(rng, (64, 96, 44)))
    _ground(image, _jitter(rng, (108, 132, 70)), slab=9.0, joint=1.0, rng_shift=0)
    for _ in range(900):
        x, y = rng.uniform(0, STRIP[0]), rng.uniform(BOUNDARY - 8, STRIP[1])
        draw.line((x, y, x + rng.uniform(-3, 3), y - 6), fill=_jitter(rng, (84, 116, 52), 18))
    draw.polygon(
        [(0, 238), (STRIP[0], 226), (STRIP[0], 300), (0, 312)], fill=_jitter(rng, (170, 156, 134))
    )


def _shop(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    frame = _jitter(rng, (70, 66, 66))
    draw.rectangle((0, 0, STRIP[0], BOUNDARY), fill=frame)
    x = 6
    while x < STRIP[0]:
        width = int(rng.integers(90, 150))
        draw.rectangle((x, 34, x + width, BOUNDARY - 22), fill=_jitter(rng, (196, 190, 170)))
        for shelf in range(46, BOUNDARY - 36, 30):
            spot = x + 6
            while spot < x + width - 14:
                size = int(rng.integers(7, 16))
                goods = _goods(rng)
                draw.rectangle(
                    (spot, shelf + int(rng.integers(0, 9)), spot + size, shelf + 22), fill=goods
                )
                spot += size + 3
            draw.line((x, shelf + 24, x + width, shelf + 24), fill=(120, 110, 98), width=3)
        draw.polygon(
            [(x + 12, BOUNDARY - 22), (x + 58, 34), (x + 82, 34), (x + 36, BOUNDARY - 22)],
            fill=(214, 214, 208),
        )
        x += width + 10
    sign = _jitter(rng, (150, 52, 48), 30)
    for stripe in range(0, STRIP[0], 44):
        draw.rectangle((stripe, 0, stripe + 21, 30), fill=sign)
        draw.rectangle((stripe + 22, 0, stripe + 43, 30), fill=(222, 214, 204))
    _ground(image, _jitter(rng, (138, 126, 118)), slab=0.4, joint=0.84, rng_shift=21, alternate=0.9)


def _corridor(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    wall = _jitter(rng, (206, 204, 190), 8)
    draw.rectangle((0, 0, STRIP[0], BOUNDARY), fill=wall)
    draw.rectangle((0, 104, STRIP[0], BOUNDARY), fill=_shaded(wall, 0.84))
    draw.line((0, 104, STRIP[0], 104), fill=_shaded(wall, 0.6), width=4)
    for x in range(int(rng.integers(20, 60)), STRIP[0], 176):
        door = _jitter(rng, (126, 92, 62), 18)
        draw.rectangle((x - 6, 14, x + 76, BOUNDARY), fill=_shaded(wall, 0.68))
        draw.rectangle((x, 20, x + 70, BOUNDARY), fill=door)
        draw.rectangle((x + 18, 36, x + 52, 86), fill=(150, 170, 178))
        draw.ellipse((x + 58, 112, x + 65, 119), fill=(206, 196, 160))
        draw.rectangle((x + 100, 40, x + 142, 88), fill=_jitter(rng, (176, 176, 190), 26))
        draw.rectangle((x + 106, 46, x + 136, 66), fill=_jitter(rng, (120, 120, 130), 40))
    draw.rectangle((0, BOUNDARY - 12, STRIP[0], BOUNDARY), fill=(88, 84, 80))
    _ground(
        image, _jitter(rng, (182, 178, 164), 8), slab=0.5, joint=0.86, rng_shift=0, alternate=0.93
    )


def _crossing(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, STRIP[0], BOUNDARY), fill=_jitter(rng, (138, 132, 130)))
    for x in range(0, STRIP[0], 120):
        house = _jitter(rng, (150, 130, 114), 24)
        draw.rectangle((x, 0, x + 118, 130), fill=house)
        for wx in range(x + 12, x + 104, 32):
            draw.rectangle((wx, 18, wx + 18, 54), fill=_shaded(house, 0.5))
            draw.rectangle((wx, 74, wx + 18, 112), fill=_shaded(house, 0.55))
    draw.rectangle((0, 128, STRIP[0], BOUNDARY), fill=(116, 114, 112))
    x = int(rng.integers(0, 60))
    while x < STRIP[0]:
        paint = _goods(rng)
        draw.polygon(
            [(x + 34, 108), (x + 118, 108), (x + 142, 136), (x + 12, 136)], fill=(58, 68, 80)
        )
        draw.rounded_rectangle((x, 132, x + 164, 172), 12, fill=paint)
        draw.rectangle((x + 4, 152, x + 160, 158), fill=_shaded(paint, 0.7))
        for wheel in (x + 22, x + 114):
            draw.ellipse((wheel, 154, wheel + 30, 184), fill=(26, 26, 28))
            draw.ellipse((wheel + 9, 163, wheel + 21, 175), fill=(140, 140, 144))
        x += int(rng.integers(190, 260))
    _ground(image, _jitter(rng, (98, 98, 102), 6), slab=30.0, joint=1.0, rng_shift=0)
    for x in range(-60, STRIP[0] + 60, 86):
        draw.polygon([(x, 322), (x + 52, 322), (x + 66, 214), (x + 28, 214)], fill=(206, 204, 196))
    draw.rectangle((0, BOUNDARY, STRIP[0], BOUNDARY + 7), fill=(150, 148, 142))


def _station(image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    brick = _jitter(rng, (128, 82, 66), 10)
    draw.rectangle((0, 0, STRIP[0], BOUNDARY), fill=_shaded(brick, 0.72))
    for row, y in enumerate(range(0, BOUNDARY, 11)):
        for x in range(-24 + 12 * (row % 2), STRIP[0], 25):
            draw.rectangle((x, y, x + 22, y + 8), fill=_jitter(rng, brick, 9))
    for x in range(int(rng.integers(20, 70)), STRIP[0], 150):
        paper = _jitter(rng, (190, 180, 160), 30)
        draw.rectangle((x - 4, 26, x + 72, 130), fill=(60, 56, 54))
        draw.rectangle((x, 30, x + 68, 126), fill=paper)
        draw.ellipse((x + 12, 42, x + 56, 86), fill=_goods(rng))
        draw.rectangle((x + 8, 96, x + 60, 104), fill=_shaded(paper, 0.5))
        draw.rectangle((x + 8, 110, x + 44, 116), fill=_shaded(paper, 0.6))
    _ground(image, _jitter(rng, (116, 112, 110), 8), slab=0.48, joint=0.74, rng_shift=15)
    draw.polygon([(0, 212), (STRIP[0], 212), (STRIP[0], 224), (0, 224)], fill=(196, 160, 56))


SCENES = {
    "plaza": _plaza,
    "park": _park,
    "shop": _shop,
    "corridor": _corridor,
    "crossing": _crossing,
    "station": _station,
}
