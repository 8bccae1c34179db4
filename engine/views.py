"""Images of a batch in every form, and images for people to look at.

``ViewMaker`` returns anonymized, encrypted, decrypted and recovered images. Other functions draw
grids of images, ranked lists and activation maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from data.records import Batch, Sample
from engine.scoring.features import Features, UnitFeatures
from engine.scoring.matching import JUNK_PID
from engine.scoring.retrieval import QueryResults
from layers.pixels import PixelSpace
from modeling.encryption.cipher import Cipher, read_sealed
from modeling.privacy_networks import PrivacyNetworks, ReIDOnly
from modeling.reid_network import ReIDNetwork
from utils.device import exact_float32
from utils.errors import UserError
from utils.files import atomic_write

Pixels = NDArray[np.uint8]  # (H, W, 3)

_INK, _PAPER = (20, 20, 20), (255, 255, 255)


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

    The batches come from a loader over ``samples``, which may leave some of them out.
    """
    images_of: dict[str, list[Tensor]] = {}
    for batch in batches:
        subjects = [samples[index].subject for index in batch.index.tolist()]
        for kind, images in {"raw": batch.raw, **views(batch, subjects).kinds}.items():
            images_of.setdefault(kind, []).append(images)
    return {kind: torch.cat(parts) for kind, parts in images_of.items()}


_GAP = 4
_ENLARGED_WIDTH = 96  # about as wide as the captions


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
    total_width = left + len(columns) * (cell + _GAP) + _GAP
    total_height = top + count * (height + _GAP) + _GAP
    grid = Image.new("RGB", (total_width, total_height), _PAPER)
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
    return torch.from_numpy(np.array(grid)).permute(2, 0, 1)


# Colours that readers with any kind of colour vision can tell apart; frames also differ in style.
_HIT, _MISS = (0, 114, 178), (213, 94, 0)
_FRAME, _LIST_GAP, _LINE = 3, 6, 14
_BLEND = 0.5  # share of the activation map in an overlay


@dataclass(frozen=True)
class RankedList:
    """The gallery images most similar to one query."""

    query: int  # index of the query
    gallery: tuple[int, ...]  # indices of the gallery images, most similar first (K,)
    similarity: tuple[float, ...]  # cosine similarities (K,)
    hit: tuple[bool, ...]  # whether each shows the identity of the query (K,)


def rank_gallery(
    query: Features, gallery: Features, chosen: Sequence[int], *, cross_camera: bool, top: int = 10
) -> list[RankedList]:
    """Return the ranked lists of some queries, by the rules of the scores.

    Junk (pid -1) is left out. With ``cross_camera``, so are images of the query's identity and
    camera. Ties go to the earlier gallery image. Images whose features are NaN or zero are last.
    """
    units = UnitFeatures.of(gallery)
    with exact_float32(gallery.embeddings.device):
        rows = UnitFeatures.of(query).unit_rows(torch.as_tensor(chosen))
        similarity = rows @ units.unit_rows(torch.arange(len(gallery.pids))).T
    similarity.masked_fill_(units.broken, -2.0)  # below every cosine
    lists = []
    for index, row in zip(chosen, similarity, strict=True):
        same = gallery.pids == query.pids[index]
        hidden = gallery.pids == JUNK_PID
        if cross_camera:
            hidden |= same & (gallery.camids == query.camids[index])
        row = row.masked_fill(hidden, -torch.inf)
        order = row.argsort(descending=True, stable=True)[: min(top, int((~hidden).sum()))]
        lists.append(
            RankedList(
                int(index),
                tuple(order.tolist()),
                tuple(row[order].tolist()),
                tuple(same[order].tolist()),
            )
        )
    return lists


def choose_queries(results: QueryResults, count: int) -> dict[str, list[int]]:
    """Return the best, median and worst queries by average precision, ``count`` of each.

    Groups of a small set may share queries.
    """
    order = np.argsort(-results.average_precision, kind="stable")
    middle = max(0, (len(order) - count) // 2)
    groups = {
        "best": order[:count],
        "median": order[middle : middle + count],
        "worst": order[-count:],
    }
    return {name: results.index[places].tolist() for name, places in groups.items()}


def draw_ranked_lists(
    lists: Sequence[tuple[str, RankedList]],
    queries: Sequence[Pixels],
    galleries: Sequence[Sequence[Pixels]],
) -> Image.Image:
    """Draw a row for each list: the query, then the gallery images.

    Hits have a solid blue frame and a check mark, misses a dashed orange frame and a cross. Each
    row has a caption, an image of its query, and images of its gallery entries, all of one size.
    """
    height, width = queries[0].shape[:2]
    columns = 1 + max(len(ranked.gallery) for _, ranked in lists)
    row_height = height + 2 * _FRAME + _LINE + _LIST_GAP
    caption = max(64, width)
    total_width = caption + columns * (width + 2 * _FRAME + _LIST_GAP) + 2 * _LIST_GAP
    total_height = len(lists) * row_height + _LIST_GAP
    sheet = Image.new("RGB", (total_width, total_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for number, ((name, ranked), query, images) in enumerate(
        zip(lists, queries, galleries, strict=True)
    ):
        top = _LIST_GAP + number * row_height
        draw.text((_LIST_GAP, top + height / 2), name, _INK, font)
        left = caption + _LIST_GAP
        sheet.paste(Image.fromarray(query), (left + _FRAME, top + _FRAME))
        draw.text((left + _FRAME, top + height + 2 * _FRAME), "query", _INK, font)
        for image, similarity, hit in zip(images, ranked.similarity, ranked.hit, strict=True):
            left += width + 2 * _FRAME + _LIST_GAP
            sheet.paste(Image.fromarray(image), (left + _FRAME, top + _FRAME))
            box = (left, top, left + width + 2 * _FRAME - 1, top + height + 2 * _FRAME - 1)
            _frame(draw, box, hit=hit)
            below = top + height + 2 * _FRAME
            _mark(draw, left + _FRAME, below + 3, hit=hit)
            draw.text((left + _FRAME + 11, below), f"{similarity:.2f}", _INK, font)
    return sheet


def _frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], *, hit: bool) -> None:
    if hit:
        draw.rectangle(box, outline=_HIT, width=_FRAME)
        return
    left, top, right, bottom = box
    dash, inner = 6, _FRAME - 1
    for x in range(left, right, 2 * dash):
        for y in (top, bottom - inner):
            draw.rectangle((x, y, min(x + dash, right), y + inner), fill=_MISS)
    for y in range(top, bottom, 2 * dash):
        for x in (left, right - inner):
            draw.rectangle((x, y, x + inner, min(y + dash, bottom)), fill=_MISS)


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, *, hit: bool) -> None:
    """Draw a check mark or a cross of 8 x 8 pixels; the default font has neither."""
    if hit:
        draw.line((x, y + 4, x + 3, y + 7, x + 8, y), fill=_HIT, width=2)
    else:
        draw.line((x, y, x + 7, y + 7), fill=_MISS, width=2)
        draw.line((x, y + 7, x + 7, y), fill=_MISS, width=2)


@torch.inference_mode()
def activation_maps(reid: ReIDNetwork, images: Tensor) -> Tensor:
    """Return where the re-ID network responds, (B, H, W) in [0, 1].

    The map is the sum of squares over the channels of the last feature map, scaled to [0, 1] for
    each image and resized to the image.

    Source: S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017.

    Raises:
        UserError: The backbone's output is not a feature map (B, C, h, w).
    """
    features = reid.base(images).float()
    if features.ndim != 4:
        raise UserError(
            f"{reid.name} returns features of shape {tuple(features.shape)}; activation maps need "
            "(B, C, h, w)"
        )
    energy = features.pow(2).sum(1, keepdim=True)
    low, high = energy.amin((2, 3), keepdim=True), energy.amax((2, 3), keepdim=True)
    scaled = (energy - low) / (high - low).clamp_min(torch.finfo(energy.dtype).tiny)
    return F.interpolate(scaled, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def overlay(image: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """Return an image in grey under a coloured map."""
    from matplotlib import colormaps  # takes long to load; most commands draw no maps

    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    colours = 255 * colormaps["viridis"](heat)[..., :3]
    blended: Pixels = ((1 - _BLEND) * grey + _BLEND * colours).round().astype(np.uint8)
    return blended
