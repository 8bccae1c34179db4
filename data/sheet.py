"""Contact sheets: a look at a data set on one picture, such as docs/images/synthetic.png."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from data.images import BadImage, read_rgb
from data.records import Sample

_NOTHING = (128, 128, 128)


@dataclass(frozen=True)
class ContactSheet:
    """A sheet, and what is on it.

    Attributes:
        image: The picture.
        pids, camids: Identities of the rows, and cameras of the columns (counted from 0).
        bad: Pictures that cannot be decoded.
    """

    image: Image.Image
    pids: tuple[int, ...]
    camids: tuple[int, ...]
    bad: tuple[BadImage, ...]


def contact_sheet(
    samples: Sequence[Sample],
    *,
    people: int,
    cameras: int,
    tile: tuple[int, int] = (64, 128),
    gap: int = 2,
) -> ContactSheet:
    """Lay out pictures with one identity a row and one camera a column.

    Args:
        samples: Pictures, at least one; of one identity and camera the first by path is taken.
        people: Identities shown at most, the lowest first.
        cameras: Cameras shown at most, the lowest first.
        tile: Width and height that each picture is brought to, in pixels.
        gap: White pixels between pictures.

    Returns:
        RGB image; a place without a picture is grey, one whose picture cannot be decoded black.
    """
    chosen: dict[tuple[int, int], Sample] = {}
    for sample in sorted(samples, key=lambda sample: sample.path):
        chosen.setdefault((sample.pid, sample.camid), sample)
    pids = sorted({pid for pid, _ in chosen})[:people]
    camids = sorted({camid for pid, camid in chosen if pid in pids})[:cameras]
    width, height = tile
    size = (len(camids) * (width + gap) - gap, len(pids) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    bad: list[BadImage] = []
    for row, pid in enumerate(pids):
        for column, camid in enumerate(camids):
            picture = Image.new("RGB", tile, _NOTHING)
            if (pid, camid) in chosen:
                try:
                    picture = read_rgb(chosen[pid, camid].path).resize(tile)
                except BadImage as error:
                    bad.append(error)
                    picture = Image.new("RGB", tile, "black")
            sheet.paste(picture, (column * (width + gap), row * (height + gap)))
    return ContactSheet(sheet, tuple(pids), tuple(camids), tuple(bad))
