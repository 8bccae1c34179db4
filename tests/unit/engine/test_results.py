from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from engine.results import DIRECTIONS, RESULTS_NAME, Results, Spread
from utils.errors import UserError


def content() -> dict[str, Any]:
    """Results whose rank-1 says the direction (tens) and the key (units)."""
    rows = []
    for place, (query, gallery) in enumerate(DIRECTIONS):
        for unit, key in enumerate(("none", "right", "ciphertext")):
            if key == "none" or place:
                rate = (10 * place + unit) / 100
                rows.append(
                    {"query": query, "gallery": gallery, "key": key, "rank1": rate, "mAP": rate / 2}
                )
    quality = {"recovered": {"psnr_db": None, "ssim": 1}}
    return {
        "headline_key": "right", "retrieval": rows, "image_quality": quality, "versions": {"a": "b"}
    }  # fmt: skip


def save(folder: Path, what: object) -> Path:
    (folder / RESULTS_NAME).write_text(json.dumps(what), "utf-8")
    return folder


@pytest.mark.parametrize(("key", "unit"), [("right", 1), ("ciphertext", 2), ("none", 0)])
def test_the_headline_s_key_is_taken(tmp_path: Path, key: str, unit: int) -> None:
    found = Results.load(save(tmp_path, content() | {"headline_key": key}))
    names = ["->".join(way) for way in DIRECTIONS]
    # Nothing encrypted is involved in raw->raw.
    expected = [0.0, *((10 * place + unit) / 100 for place in (1, 2, 3))]
    assert found.rank1 == pytest.approx(dict(zip(names, expected, strict=True)))
    assert found.mAP == pytest.approx({name: rate / 2 for name, rate in found.rank1.items()})
    assert found.psnr_db == {"recovered": math.inf}
    assert (found.ssim, found.versions) == ({"recovered": 1.0}, {"a": "b"})


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {"retrieval": []},
        {"retrieval": 3},
        {"headline_key": "right", "retrieval": [{"query": "raw"}]},
        content() | {"image_quality": []},
        content() | {"image_quality": {"recovered": {"psnr_db": "much", "ssim": 1}}},
    ],
)
def test_what_is_no_result_is_named(tmp_path: Path, damage: object) -> None:
    with pytest.raises(UserError, match=r"results\.json is no result .* evaluate again"):
        Results.load(save(tmp_path, damage))
    (tmp_path / RESULTS_NAME).write_text('{"retr', "utf-8")
    with pytest.raises(UserError, match="is no result"):
        Results.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Results.load(tmp_path / "nowhere")


def test_the_worst_psnr_is_no_infinite_one(tmp_path: Path) -> None:
    worst = {"image_quality": {"encrypted": {"psnr_db": 0.0, "ssim": 0}}}
    assert Results.load(save(tmp_path, content() | worst)).psnr_db == {"encrypted": 0.0}


def test_spread_is_that_of_a_sample() -> None:
    values = [0.871, 0.866, 0.874]
    found = Spread.of(values)
    assert found.mean == pytest.approx(sum(values) / 3)
    assert found.deviation == pytest.approx(statistics.stdev(values))
    assert found.text(scale=100) == "87.0 ± 0.4"
    assert Spread.of([0.5]) == Spread(0.5, None)
    assert Spread.of([0.5]).text(2) == "0.50"
    assert Spread.of([math.inf, math.inf]).text() == "inf"  # PSNR of equal images
