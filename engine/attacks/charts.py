"""Charts of results: intervals with floors, curves, and grids of example images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image
from torch import Tensor

from engine.attacks.measures import Result
from engine.views import image_grid
from layers.pixels import PixelSpace

_FAILS, _HOLDS, _FLOOR = "#c0392b", "#1f6fb4", "#9a9a9a"
_COLOURS = {
    "raw": "#555555",
    "desensitized": "#e08214",
    "anonymized": "#2a9d5c",
    "additive": "#c0392b",
    "aead": "#1f6fb4",
}
_DPI = 110
_UNITS = {"rate": "share", "ssim": "SSIM", "lpips": "LPIPS", "r": "correlation"}


def verdict_chart(results: Sequence[Result], title: str) -> Image.Image:
    """Return a chart of the deciding measures of one attack, with intervals and floors.

    Levels to which the attack does not apply are left out.
    """
    shown = [result for result in results if result.measures]
    names = list(dict.fromkeys(m.name for r in shown for m in r.measures if m.decides))
    columns = max(1, min(2, len(names)))
    rows = max(1, -(-len(names) // columns))
    figure = Figure(
        figsize=(max(6.8, 5.2 * columns), 0.9 + rows * (1.1 + 0.34 * len(shown))), dpi=_DPI
    )
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, name in zip(axes, names, strict=False):
        _intervals(ax, name, shown)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=11)
    losses = any(m.bad_side == "below" for r in shown for m in r.measures)
    floor = "stored values" if losses else "chance"
    figure.legend(
        handles=[
            Line2D([], [], marker="o", color=_FAILS, label="beyond the floor (fails)"),
            Line2D([], [], marker="o", color=_HOLDS, label="within the floor (holds)"),
            Patch(color=_FLOOR, alpha=0.45, label=f"floor: {floor}"),
        ],
        loc="outside lower center", ncols=3, fontsize=8, frameon=False,
    )  # fmt: skip
    return render(figure)


def curve_chart(results: Sequence[Result], title: str) -> Image.Image | None:
    """Return a chart of the curves of one attack, a line for each level; None without curves."""
    shown = [result for result in results if len(result.curve) > 1]
    if not shown:
        return None
    names = [m.name for m in shown[0].curve[0].measures]
    names = [name for name in ("psnr", "ssim") if name in names] or names[:2]
    figure = Figure(figsize=(5.2 * len(names) + 1.3, 3.8), dpi=_DPI)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for result in shown:
            x = [point.x for point in result.curve]
            measures = [m for point in result.curve for m in point.measures if m.name == name]
            colour = _COLOURS.get(result.level, "black")
            values = [m.value.value for m in measures]
            ax.plot(x, values, "o-", color=colour, label=result.level, ms=4)
            low, high = ([getattr(m.value, end) for m in measures] for end in ("low", "high"))
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        floors = [m.floor.value for m in measures]
        ax.plot(x, floors, "--", color=_FLOOR, label="guess without the image")
        if x[-1] > 20:
            ax.set_xscale("log", base=2)
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        ax.set_xlabel(shown[0].curve_of)
        ax.set_ylabel("PSNR (dB)" if name == "psnr" else name.upper())
        ax.grid(alpha=0.25)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return render(figure)


def image_sheet(
    columns: Mapping[str, Mapping[str, Tensor]], pixels: PixelSpace
) -> Image.Image | None:
    """Return a grid of example images, a row for each identity and level; None without images.

    ``columns`` contains, for each level, images by name, values in [0, 1], each (K, 3, H, W).
    """
    filled = {level: images for level, images in columns.items() if images}
    if not filled:
        return None
    names = list(next(iter(filled.values())))
    rows = [
        level if number == 0 else ""
        for level, images in filled.items()
        for number in range(len(images[names[0]]))
    ]
    grid = {
        name: pixels.normalize(torch.cat([images[name] for images in filled.values()]))
        for name in names
    }
    return image_grid(grid, pixels, rows)


def _intervals(ax: Axes, name: str, results: Sequence[Result]) -> None:
    unit = ""
    levels: list[str] = []
    for result in results:
        measures = [m for m in result.measures if m.name == name]
        if not measures:
            continue
        measure, row = measures[0], len(levels)
        levels.append(result.level)
        unit = _UNITS.get(measure.unit, measure.unit)
        width = max(measure.floor.high - measure.floor.low, 0.0)
        ax.barh(row, width, 0.56, measure.floor.low, color=_FLOOR, alpha=0.45)
        ax.plot([measure.floor.value] * 2, [row - 0.28, row + 0.28], color=_FLOOR, lw=2)
        colour = _FAILS if measure.beyond_floor else _HOLDS
        ends = [
            [max(0.0, measure.value.value - measure.value.low)],
            [max(0.0, measure.value.high - measure.value.value)],
        ]
        ax.errorbar(measure.value.value, row, xerr=ends, fmt="o", color=colour, capsize=3, ms=5)
    ax.set_yticks(range(len(levels)), levels)
    ax.set_ylim(len(levels) - 0.4, -0.6)
    ax.set_title(name.replace("_", " "), fontsize=9)
    ax.set_xlabel(unit, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.use_sticky_edges = False  # keep the ends of bars away from the frame
    ax.margins(x=0.06)
    ax.grid(axis="x", alpha=0.25)


def render(figure: Figure) -> Image.Image:
    """Return a figure as an RGB image."""
    figure.set_layout_engine("constrained")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB")
