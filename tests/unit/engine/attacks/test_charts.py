"""Charts of attacks, drawn completely: tests of whole attacks leave them white."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from configs import loading
from engine.attacks import charts
from engine.attacks.measures import CurvePoint, Measure, Result
from engine.scoring.intervals import Interval
from tools.frontier import FrontierPoint, frontier_chart, protections
from utils.errors import UserError

FLOOR = Interval(0.5, 0.4, 0.6)


def measure(value: float, name: str = "ssim") -> Measure:
    return Measure(name, name, Interval(value, value - 0.02, value + 0.02), FLOOR, True)


def count(image: Image.Image, colour: str) -> int:
    """Return the number of pixels of exactly this colour."""
    pixels = np.asarray(image)
    return int((pixels == np.round(np.multiply(to_rgb(colour), 255))).all(-1).sum())


RESULTS = [
    Result("model", level, "S.", (measure(value), measure(value, "psnr")))
    for level, value in (("raw", 0.9), ("aead", 0.5))
]


def test_verdicts_have_the_colour_of_their_side_of_the_floor() -> None:
    fails, holds = (charts.verdict_chart([result], "Model") for result in RESULTS)
    # the legend has one marker of each colour
    assert count(fails, charts._FAILS) > 2 * count(fails, charts._HOLDS) > 0
    assert count(holds, charts._HOLDS) > 2 * count(holds, charts._FAILS) > 0


def test_a_level_without_the_attack_is_left_out() -> None:
    absent = Result("model", "anonymized", "So.", applies=False)
    assert charts.verdict_chart([*RESULTS, absent], "M") == charts.verdict_chart(RESULTS, "M")


def test_curves_have_the_colours_of_their_levels() -> None:
    curves = [
        replace(result, curve=tuple(CurvePoint(x, result.measures) for x in (8, 16, 48)))
        for result in RESULTS
    ]
    image = charts.curve_chart(curves, "Model")
    assert image is not None
    for level in ("raw", "aead"):
        assert count(image, charts._COLOURS[level]) > 100
    alone = charts.curve_chart(curves[:1], "Model")
    assert alone is not None and not count(alone, charts._COLOURS["aead"])
    assert charts.curve_chart(RESULTS, "Model") is None


def test_the_frontier_contains_every_point() -> None:
    low, high = (Interval(x, x - 0.05, x + 0.05) for x in (0.3, 0.6))
    points = [
        FrontierPoint(level, level, end, end, FLOOR, end, FLOOR, "reid-public")
        for level, end in (("anonymized", low), ("desensitized", high))
    ]
    image = frontier_chart(points)
    assert count(image, "C0") > 100 and count(image, "C1") > 100


def test_every_point_of_a_frontier_has_a_folder(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/r/full", "b/r/full", "other", "mosaic_8", "my run")]
    for path in paths:
        cfg = loading.load(None, ["INPUT.TYPE", "mosaic", "OUTPUT_DIR", str(path)])
        loading.dump(cfg, path / "config.yml")
    points = protections(paths, [4, 8], [])
    assert [point.name for point in points] == [
        "a-r-full", "b-r-full", "other", f"{tmp_path.name}-mosaic_8", "my run", "mosaic 4",
        "mosaic 8",
    ]  # fmt: skip
    assert len({point.folder for point in points}) == len(points)
    with pytest.raises(UserError, match="'full' is given twice"):
        protections([paths[0], tmp_path / "other/../a/r/full"], [], [])
