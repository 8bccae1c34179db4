"""Contact sheets: images of a data set with one identity per row and one camera per column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from data.images import BadImage, read_rgb
from data.records import Sample

_EMPTY = (128, 128, 128)


@dataclass(frozen=True)
class ContactSheet:
    """A contact sheet and its contents."""

    image: Image.Image  # the sheet
    pids: tuple[int, ...]  # identities of the rows
    camids: tuple[int, ...]  # cameras of the columns, from 0
    bad: tuple[BadImage, ...]  # images that cannot be decoded


def contact_sheet(
    samples: Sequence[Sample],
    *,
    people: int,
    cameras: int,
    names: Mapping[int, str] | None = None,
    tile: tuple[int, int] = (64, 128),
    gap: int = 2,
) -> ContactSheet:
    """Draw a contact sheet, for example docs/images/synthetic.png.

    Args:
        samples: At least one; the first path of each identity and camera is drawn.
        people: Largest number of identities.
        cameras: Largest number of cameras, lowest number first.
        names: Names by pid; the rows are sorted by pid, and people with names by name.
        tile: Width and height of each image, px.
        gap: White pixels between images.

    Returns:
        RGB image. A tile without an image is grey; one whose image cannot be decoded is black.
    """
    chosen: dict[tuple[int, int], Sample] = {}
    for sample in sorted(samples, key=lambda sample: sample.path):
        chosen.setdefault((sample.pid, sample.camid), sample)
    names = names or {}
    pids = sorted({pid for pid, _ in chosen}, key=lambda pid: (names.get(pid, ""), pid))[:people]
    camids = sorted({camid for pid, camid in chosen if pid in pids})[:cameras]
    width, height = tile
    size = (len(camids) * (width + gap) - gap, len(pids) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    bad: list[BadImage] = []
    for row, pid in enumerate(pids):
        for column, camid in enumerate(camids):
            image = Image.new("RGB", tile, _EMPTY)
            if (pid, camid) in chosen:
                try:
                    image = read_rgb(chosen[pid, camid].path).resize(tile)
                except BadImage as error:
                    bad.append(error)
                    image = Image.new("RGB", tile, "black")
            sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return ContactSheet(sheet, tuple(pids), tuple(camids), tuple(bad))
