"""The views of a batch (anonymized, encrypted, decrypted, recovered images), and grids of them."""

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
    """The images computed from one batch of B raw images, all normalised (B, 3, H, W)."""

    kinds: dict[str, Tensor]  # images whose quality is measured against raw, by kind
    protected: dict[str, Tensor]  # protected images as the re-ID network gets them, by key state
    # number of images that could not be opened, by key state
    num_refused: dict[str, int] = field(default_factory=dict)


class ViewMaker(Protocol):
    """Returns the views of a batch; the joint model and the baseline have different ones."""

    @property
    def reid(self) -> ReIDNetwork:
        """The re-ID network that is scored."""
        ...

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Return the views of a batch; ``subjects`` are the subject labels of its images."""
        ...


class BaselineViews:
    """Views of mode C: the protected image is the desensitized one, and nothing is encrypted."""

    def __init__(self, nets: ReIDOnly) -> None:
        self.reid = nets.reid

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:  # noqa: ARG002
        """Return the desensitized images as the only view."""
        return Views({"desensitized": batch.desensitized}, {"none": batch.desensitized})


class JointViews:
    """Views of mode GCR: anonymized, encrypted, decrypted and recovered images.

    Args:
        nets: The joint model, in evaluation mode.
        cipher: Encrypts anonymized images; None leaves out encrypted and decrypted images.
        recover_with_key: Whether the recovery network gets the decrypted or the encrypted image.
    """

    def __init__(
        self, nets: PrivacyNetworks, cipher: Cipher | None = None, *, recover_with_key: bool = True
    ) -> None:
        self.reid = nets.reid
        self._nets = nets
        self._cipher = cipher
        self._recover_with_key = recover_with_key

    def __call__(self, batch: Batch, subjects: Sequence[str]) -> Views:
        """Anonymize a batch, encrypt it, and decrypt it with each key state."""
        anonymized = self._nets.anonymizer(batch.raw).float()
        kinds = {"desensitized": batch.desensitized, "anonymized": anonymized}
        protected, refused = {"none": anonymized}, {}
        to_recover = anonymized
        if self._cipher is not None:
            sealed = self._cipher.seal(anonymized, subjects)
            for state in ("right", "wrong", "ciphertext"):
                reading = read_sealed(self._cipher, sealed, state)
                protected[state], refused[state] = reading.images, reading.num_refused
            if refused["wrong"] == len(sealed):  # all equal to the ciphertext view: one pass saved
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
        views: Returns all kinds but raw.
        batches: Batches of a loader over ``samples``, which may leave some of them out.
        samples: Samples with the subject labels.
    """
    images_of: dict[str, list[Tensor]] = {}
    for batch in batches:
        subjects = [samples[index].subject for index in batch.index.tolist()]
        for kind, images in {"raw": batch.raw, **views(batch, subjects).kinds}.items():
            images_of.setdefault(kind, []).append(images)
    return {kind: torch.cat(parts) for kind, parts in images_of.items()}


_GAP = 4
_ENLARGED_WIDTH = 96  # about as wide as the captions
_BACKGROUND = (255, 255, 255)
_INK = (20, 20, 20)


def image_grid(
    columns: Mapping[str, Tensor], pixels: PixelSpace, row_names: Sequence[str] = ()
) -> Image.Image:
    """Return an image with the given images side by side, a column for each kind.

    Images of up to 48 px width are enlarged by a whole number.

    Args:
        columns: Normalised images (B, 3, H, W) by kind; row b of every kind shows the same image.
            A kind may have two lines.
        pixels: Pixel space of the images; values outside [0, 1] are clamped.
        row_names: A caption for each row, or none.

    Returns:
        RGB image with B rows.

    Raises:
        ValueError: There are no columns, or their shapes differ.
    """
    shapes = {tuple(images.shape) for images in columns.values()}
    if len(shapes) != 1:
        raise ValueError(f"columns have shapes {sorted(shapes)}; expected one shape (B, 3, H, W)")
    count, _, height, width = shapes.pop()
    scale = max(1, _ENLARGED_WIDTH // width)
    height, width = scale * height, scale * width
    font = ImageFont.load_default(size=12)
    captions = {name: name.split("\n") for name in columns}
    cell = max(width, *(int(font.getlength(line)) for name in columns for line in captions[name]))
    left = max((int(font.getlength(name)) + 2 * _GAP for name in row_names), default=0)
    top = 4 + 16 * max(map(len, captions.values()))
    size = (
        left + len(columns) * (cell + _GAP) + _GAP,
        top + count * (height + _GAP) + _GAP,
    )
    grid = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for column, (name, images) in enumerate(columns.items()):
        x = left + _GAP + column * (cell + _GAP)
        for line, text in enumerate(captions[name]):
            draw.text((x + (cell - font.getlength(text)) / 2, 3 + 16 * line), text, _INK, font)
        array = pixels.to_uint8(images.cpu()).permute(0, 2, 3, 1).contiguous().numpy()
        for row in range(count):
            y = top + row * (height + _GAP)
            image = Image.fromarray(array[row]).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(image, (x + (cell - width) // 2, y))
    for row, name in enumerate(row_names):
        draw.text((_GAP, top + row * (height + _GAP) + height / 2 - 6), name, _INK, font)
    return grid


def save_image(grid: Image.Image, path: Path) -> None:
    """Write a PNG file atomically; its folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        grid.save(temporary, format="PNG")


def as_tensor(grid: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, H, W), for TensorBoard."""
    data = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
    return data.view(grid.height, grid.width, 3).permute(2, 0, 1)
