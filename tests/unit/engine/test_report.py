"""The report: its published schema and row, its log lines, and reading results.json."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.report import DIRECTIONS, RESULTS_NAME, EvalReport, Results, RetrievalRow, Spread
from engine.scoring.image_quality import ImageQuality
from utils.errors import UserError

ROW_KEYS = [
    "query", "gallery", "key", "rank1", "rank5", "rank10", "mAP", "mINP", "num_queries",
    "num_gallery",
]  # fmt: skip


def _row(direction: tuple[str, str], key: str, rank1: float) -> RetrievalRow:
    return RetrievalRow(*direction, key, rank1, 0.95, 0.99, 0.878, 0.65, 30, 200)


def _report(headline: str = "right") -> EvalReport:
    rows = [
        _row(direction, key, 0.1 * place + 0.01 * number)
        for number, key in enumerate(("none", "right", "wrong", "ciphertext"))
        for place, direction in enumerate(DIRECTIONS)
        if key == "none" or direction != ("raw", "raw")
    ]
    quality = {"desensitized": ImageQuality(14.0, 0.4), "anonymized": ImageQuality(13.0, 0.3)}
    return EvalReport("market1501", "test", "GCR", 120, headline, tuple(rows), quality)


def test_the_schema_is_the_published_one() -> None:
    content = json.loads(json.dumps(_report().to_json()))
    assert content["schema"] == 1
    for name in ("dataset", "split", "mode", "epoch", "retrieval", "image_quality", "versions"):
        assert name in content
    assert (content["dataset"], content["split"]) == ("market1501", "test")
    assert (content["mode"], content["epoch"]) == ("GCR", 120)
    for row in content["retrieval"]:
        assert list(row) == ROW_KEYS  # flags are left out unless they are set
        assert row["query"] in ("raw", "protected")
        assert row["gallery"] in ("raw", "protected")
        assert row["key"] in ("none", "right", "wrong", "ciphertext")
    assert content["image_quality"]["anonymized"] == {"psnr_db": 13.0, "ssim": 0.3}


def test_flags_that_are_set_are_written() -> None:
    row = replace(_row(DIRECTIONS[1], "wrong", 0.1), refused=True, num_skipped=2, degenerate=True)
    content = replace(_report(), retrieval=(*_report().retrieval, row)).to_json()["retrieval"][-1]
    assert content["refused"] is True
    assert content["num_skipped"] == 2
    assert content["degenerate"] is True
    table = replace(_report(), retrieval=(*_report().retrieval, row)).table()
    assert "refused; scored as an observer sees it" in table
    assert "2 queries without a match left out" in table
    assert "DEGENERATE" in table


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinite_numbers_are_null_in_json(tmp_path: Path, value: float) -> None:
    quality = {"decrypted": ImageQuality(value, 1.0)}
    replace(_report(), image_quality=quality).save(tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text("utf-8")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    content = json.loads(text, parse_constant=refuse)
    assert content["image_quality"] == {"decrypted": {"psnr_db": None, "ssim": 1.0}}


def test_saving_replaces_atomically(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old", encoding="utf-8")
    _report().save(path)
    assert json.loads(path.read_text("utf-8"))["epoch"] == 120
    assert list(tmp_path.iterdir()) == [path]


def test_the_published_row_names_its_key() -> None:
    assert _report("none").published_row() == "0.0/10.0/20.0/30.0"
    assert _report("right").published_row() == "0.0/11.0/21.0/31.0"
    assert _report("ciphertext").published_row() == "0.0/13.0/23.0/33.0"
    assert (
        "raw->raw / raw->protected / protected->raw / protected->protected: " in _report().table()
    )


def test_rows_are_found_by_direction_and_key() -> None:
    report = _report()
    assert report.row("raw", "raw", "wrong").key == "none"  # does not depend on keys
    assert report.row("protected", "raw", "ciphertext").rank1 == pytest.approx(0.23)
    with pytest.raises(KeyError):
        replace(report, retrieval=report.retrieval[:4]).row("raw", "protected", "right")


def test_validation_uses_raw_queries_in_a_protected_gallery() -> None:
    seen = _report().validation
    assert seen.rank1 == pytest.approx(0.1)
    assert (seen.psnr_anonymized_db, seen.psnr_desensitized_db) == (13.0, 14.0)
    assert (seen.ssim_anonymized, seen.ssim_desensitized) == (0.3, 0.4)


def test_log_lines_for_scripts() -> None:
    rows = (_row(("raw", "protected"), "none", 0.5), _row(("raw", "protected"), "right", 0.951))
    report = replace(_report(), retrieval=rows, headline_key="right")
    assert report.log_lines() == [
        "Validation Results - Epoch: 120",
        "mINP: 65.0%",
        "mAP: 87.8%",
        "CMC curve, Rank-1  :95.1%",
        "CMC curve, Rank-5  :95.0%",
        "CMC curve, Rank-10 :99.0%",
    ]
    pattern = r"CMC curve, Rank-1  :(.+?)%"
    assert [m[1] for m in map(re.compile(pattern).match, report.log_lines()) if m] == ["95.1"]


def test_scalars_have_slash_names() -> None:
    numbers = _report().scalars()
    assert numbers["eval/raw->protected/rank1"] == pytest.approx(0.1)
    assert numbers["eval/raw->protected/wrong/rank1"] == pytest.approx(0.12)
    assert numbers["privacy/anonymized/psnr"] == 13.0
    assert numbers["privacy/desensitized/ssim"] == 0.4


def test_the_table_names_every_row() -> None:
    table = _report().table()
    for row in _report().retrieval:
        pattern = rf"{row.query} -> {row.gallery} +{row.key} +{100 * row.rank1:.1f}%"
        assert re.search(pattern, table), pattern
    assert "desensitized" in table


def test_heads_and_rows_are_aligned() -> None:
    report = _report()
    lines = replace(report, reranked=report.retrieval).table().splitlines()
    heads = [line for line in lines if "query -> gallery" in line]
    assert len(heads) == 2
    for head in heads:
        assert re.search(r"gallery +key +rank-1 +-5 +-10 +mAP +mINP$", head), head
    rows = [line for line in lines if re.match("  (raw|protected) -> ", line)]
    ends = {line.index(line.split()[3]) for line in rows} | {line.index("key") for line in heads}
    assert len(ends) == 1
    assert len({len(line) for line in heads + rows}) == 1


def test_a_caution_is_one_line_below_the_scores() -> None:
    lines = replace(_report(), caution="noise matches noise").table().splitlines()
    place = lines.index("noise matches noise")
    assert "ciphertext" in lines[place - 1]
    assert lines[place + 1] == ""
    assert "noise matches noise" not in _report().table()


def content() -> dict[str, Any]:
    """Results whose rank-1 encodes the direction (tens) and the key (units)."""
    rows = []
    for number, (query, gallery) in enumerate(DIRECTIONS):
        for unit, key in enumerate(("none", "right", "ciphertext")):
            if key == "none" or number:
                rate = (10 * number + unit) / 100
                rows.append(
                    {"query": query, "gallery": gallery, "key": key, "rank1": rate, "mAP": rate / 2}
                )
    quality = {"recovered": {"psnr_db": None, "ssim": 1}}
    return {
        "headline_key": "right", "retrieval": rows, "image_quality": quality, "versions": {"a": "b"}
    }  # fmt: skip


def _save(folder: Path, content: object) -> Path:
    (folder / RESULTS_NAME).write_text(json.dumps(content), "utf-8")
    return folder


@pytest.mark.parametrize(("key", "unit"), [("right", 1), ("ciphertext", 2), ("none", 0)])
def test_results_are_those_of_the_headline_key(tmp_path: Path, key: str, unit: int) -> None:
    results = Results.load(_save(tmp_path, content() | {"headline_key": key}))
    names = ["->".join(way) for way in DIRECTIONS]
    # raw->raw does not depend on keys.
    expected = [0.0, *((10 * number + unit) / 100 for number in (1, 2, 3))]
    assert results.rank1 == pytest.approx(dict(zip(names, expected, strict=True)))
    assert results.mAP == pytest.approx({name: rate / 2 for name, rate in results.rank1.items()})
    assert results.psnr_db == {"recovered": math.inf}
    assert (results.ssim, results.versions) == ({"recovered": 1.0}, {"a": "b"})


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
def test_damaged_results_are_refused(tmp_path: Path, damage: object) -> None:
    with pytest.raises(UserError, match=r"results\.json is not the report .* evaluate"):
        Results.load(_save(tmp_path, damage))
    (tmp_path / RESULTS_NAME).write_text('{"retr', "utf-8")
    with pytest.raises(UserError, match="is not the report"):
        Results.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Results.load(tmp_path / "nowhere")


def test_psnr_0_is_not_read_as_infinite(tmp_path: Path) -> None:
    worst = {"image_quality": {"encrypted": {"psnr_db": 0.0, "ssim": 0}}}
    assert Results.load(_save(tmp_path, content() | worst)).psnr_db == {"encrypted": 0.0}


def test_spread_is_the_sample_deviation() -> None:
    values = [0.871, 0.866, 0.874]
    results = Spread.of(values)
    assert results.mean == pytest.approx(sum(values) / 3)
    assert results.deviation == pytest.approx(statistics.stdev(values))
    assert results.text(scale=100) == "87.0 ± 0.4"
    assert Spread.of([0.5]) == Spread(0.5, None)
    assert Spread.of([0.5]).text(2) == "0.50"
    assert Spread.of([math.inf, math.inf]).text() == "inf"  # PSNR of equal images
