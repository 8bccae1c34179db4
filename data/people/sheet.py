"""Contact sheets: a look at a data set on one picture, such as docs/images/synthetic.png."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from PIL import Image

from data.people.photograph import SIZE
from data.records import Sample


def contact_sheet(
    samples: Iterable[Sample], columns: int, *, rows: int = 12, gap: int = 2
) -> Image.Image:
    """Lay out pictures with one identity a row and one camera a column.

    Args:
        samples: Pictures; of several of one identity and camera the first by path is taken.
        columns: Cameras shown, the lowest first.
        rows: Identities shown at most, the lowest first.
        gap: White pixels between pictures.

    Returns:
        RGB image; a place without a picture stays grey.
    """
    chosen: dict[int, dict[int, str]] = defaultdict(dict)
    for sample in sorted(samples, key=lambda sample: sample.path):
        chosen[sample.pid].setdefault(sample.camid, sample.path)
    pids = sorted(chosen)[:rows]
    cameras = sorted({camid for pid in pids for camid in chosen[pid]})[:columns]
    width, height = SIZE
    size = (columns * (width + gap) - gap, max(1, len(pids) * (height + gap) - gap))
    sheet = Image.new("RGB", size, "white")
    for row, pid in enumerate(pids):
        for column, camid in enumerate(cameras):
            spot = (column * (width + gap), row * (height + gap))
            tile = Image.new("RGB", SIZE, (128, 128, 128))
            if camid in chosen[pid]:
                with Image.open(chosen[pid][camid]) as picture:
                    tile = picture.convert("RGB").resize(SIZE)
            sheet.paste(tile, spot)
    return sheet
