"""Images for people to look at: ranked lists, activation maps, and the stages of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from engine.scoring.features import Features
from engine.scoring.matching import JUNK_PID
from engine.scoring.retrieval import QueryResults
from modeling.reid_network import ReIDNetwork
from utils.errors import UserError

Pixels = NDArray[np.uint8]  # (H, W, 3)

# Colours that readers with any kind of colour vision can tell apart; frames also differ in style.
_HIT, _MISS, _INK, _PAPER = (0, 114, 178), (213, 94, 0), (20, 20, 20), (255, 255, 255)
_FRAME, _GAP, _LINE = 3, 6, 14
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
    camera. Ties go to the earlier gallery image.
    """
    rows = F.normalize(query.embeddings[list(chosen)].float())
    similarity = rows @ F.normalize(gallery.embeddings.float()).T
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

    Args:
        results: Results of each query.
        count: Queries in each group; groups of a small set may share queries.
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

    Hits have a solid blue frame and a check mark, misses a dashed orange frame and a cross.

    Args:
        lists: A caption and a ranked list for each row.
        queries: Image of each query (H, W, 3), all of one size.
        galleries: Images of each row's gallery entries, of the same size.
    """
    height, width = queries[0].shape[:2]
    columns = 1 + max(len(ranked.gallery) for _, ranked in lists)
    row_height = height + 2 * _FRAME + _LINE + _GAP
    caption = max(64, width)
    size = (
        caption + columns * (width + 2 * _FRAME + _GAP) + 2 * _GAP,
        len(lists) * row_height + _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for number, ((name, ranked), query, images) in enumerate(
        zip(lists, queries, galleries, strict=True)
    ):
        top = _GAP + number * row_height
        draw.text((_GAP, top + height / 2), name, _INK, font)
        left = caption + _GAP
        sheet.paste(Image.fromarray(query), (left + _FRAME, top + _FRAME))
        draw.text((left + _FRAME, top + height + 2 * _FRAME), "query", _INK, font)
        for image, similarity, hit in zip(images, ranked.similarity, ranked.hit, strict=True):
            left += width + 2 * _FRAME + _GAP
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
    dash = 6
    for x in range(left, right, 2 * dash):
        end = min(x + dash, right)
        draw.rectangle((x, top, end, top + _FRAME - 1), fill=_MISS)
        draw.rectangle((x, bottom - _FRAME + 1, end, bottom), fill=_MISS)
    for y in range(top, bottom, 2 * dash):
        end = min(y + dash, bottom)
        draw.rectangle((left, y, left + _FRAME - 1, end), fill=_MISS)
        draw.rectangle((right - _FRAME + 1, y, right, end), fill=_MISS)


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
    size = (images.shape[2], images.shape[3])
    return F.interpolate(scaled, size=size, mode="bilinear", align_corners=False)[:, 0]


def overlay(image: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """Return an image in grey under a coloured map."""
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    colours = 255 * colormaps["viridis"](heat)[..., :3]
    blended: Pixels = ((1 - _BLEND) * grey + _BLEND * colours).round().astype(np.uint8)
    return blended
