"""The images that a batch turns into: anonymized, encrypted, read back with each key, recovered.

Picture grids: what happens to an image on its way, side by side, for human eyes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.records import Batch, Sample
from layers.pixels import PixelSpace
from modeling.encryption.cipher import Cipher, read_sealed
from modeling.privacy_networks import PrivacyNetworks, ReIDOnly
from modeling.reid_network import ReIDNetwork
from utils.files import atomic_write


@dataclass(frozen=True)
class Views:
    """The images that one batch of B raw images turns into, all normalised (B, 3, H, W).

    Attributes:
        kinds: Images whose quality is measured against raw, by name.
        protected: What the re-ID network is given as the protected image, by key state.
        num_refused: How many images each key state's holder could not open.
    """

    kinds: dict[str, Tensor]
    protected: dict[str, Tensor]
    num_refused: dict[str, int] = field(default_factory=dict)


class ViewMaker(Protocol):
    """Turns a batch into its views; the joint model and the baseline differ only here."""

    @property
    def reid(self) -> ReIDNetwork:
        """The re-ID network that is scored."""
        ...

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Return the views of a batch whose images belong to these subject labels."""
        ...


class BaselineViews:
    """Mode C: the protected image is the desensitized one, and nothing is encrypted."""

    def __init__(self, nets: ReIDOnly) -> None:
        self.reid = nets.reid

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:  # noqa: ARG002
        """Return the desensitized images as the only view."""
        return Views({"desensitized": batch.desensitized}, {"none": batch.desensitized})


class JointViews:
    """Mode GCR: anonymized, encrypted, decrypted and recovered images.

    Args:
        nets: The joint model, in evaluation mode.
        cipher: Encrypts anonymized images; None leaves out everything that needs it.
        recover_with_key: TEST.RECOVERY_WITH_KEY: whether recovery is given the decrypted or the
            encrypted image.
    """

    def __init__(
        self, nets: PrivacyNetworks, cipher: Cipher | None = None, *, recover_with_key: bool = True
    ) -> None:
        self.reid = nets.reid
        self._nets = nets
        self._cipher = cipher
        self._recover_with_key = recover_with_key

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Anonymize a batch, encrypt it, and read it back with each key."""
        anonymized = self._nets.anonymizer(batch.raw).float()
        kinds = {"desensitized": batch.desensitized, "anonymized": anonymized}
        protected, refused = {"none": anonymized}, {}
        to_recover = anonymized
        if self._cipher is not None:
            sealed = self._cipher.seal(anonymized, subjects)
            for state in ("right", "wrong", "ciphertext"):
                reading = read_sealed(self._cipher, sealed, state)
                protected[state], refused[state] = reading.images, reading.num_refused
            if refused["wrong"] == len(sealed):  # all are shown as an observer sees them: one pass
                protected["wrong"] = protected["ciphertext"]
            kinds |= {"encrypted": protected["ciphertext"], "decrypted": protected["right"]}
            to_recover = protected["right" if self._recover_with_key else "ciphertext"]
        kinds["recovered"] = self._nets.recovery(to_recover).float()
        return Views(kinds, protected, refused)


def images_by_kind(
    views: ViewMaker, batches: Iterable[Batch], samples: Sequence[Sample]
) -> dict[str, Tensor]:
    """Return the images of some batches in every kind, raw first, each (images, 3, H, W).

    Args:
        views: Makes the kinds besides raw.
        batches: Batches of a loader over ``samples``; it may have left some of them out.
        samples: Give the subject labels.
    """
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        subjects = [samples[index].subject for index in batch.index.tolist()]
        for kind, images in {"raw": batch.raw, **views(batch, subjects).kinds}.items():
            found.setdefault(kind, []).append(images)
    return {kind: torch.cat(parts) for kind, parts in found.items()}


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
