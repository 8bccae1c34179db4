from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.records import Sample
from engine.details import save_details, score_details
from engine.scoring.features import Features
from engine.scoring.intervals import (
    Access,
    QueryResult,
    QueryTable,
    mean_of,
    paired_differences,
    read_queries,
)
from utils.errors import UserError

HEAD = (
    "direction,key,scheme,path,pid,camid,num_matches,first_rank,last_rank,average_precision,inp\n"
)


def results(rank1: list[float], ap: list[float], people: int) -> dict[str, QueryResult]:
    return {
        f"{place}.png": QueryResult(place % people, *pair)
        for place, pair in enumerate(zip(rank1, ap, strict=True))
    }


def test_equal_models_differ_by_nothing() -> None:
    one = results([1, 0, 1, 1], [0.5, 0.1, 1.0, 0.75], people=2)
    for found in paired_differences(one, one).values():
        assert (found.value, found.low, found.high) == (0, 0, 0)


def test_a_difference_is_that_of_the_means_and_pairs_share_the_luck() -> None:
    """Queries differ widely, models by a hair: their own intervals overlap."""
    rng = np.random.default_rng(5)
    ap = rng.uniform(0.0, 0.9, 200)
    better = ap + rng.uniform(0.01, 0.03, 200)
    zeros = [0.0] * 200
    found = paired_differences(results(zeros, ap.tolist(), 40), results(zeros, better.tolist(), 40))
    assert found["mAP"].value == pytest.approx((better - ap).mean())
    assert 0.01 < found["mAP"].low < found["mAP"].value < found["mAP"].high < 0.03
    assert found["rank1"].value == 0


def test_the_sign_says_second_minus_first() -> None:
    worse, better = results([0, 0], [0.1, 0.2], 2), results([1, 1], [0.6, 0.7], 2)
    assert paired_differences(worse, better)["rank1"].value == 1
    assert paired_differences(better, worse)["mAP"].value == pytest.approx(-0.5)


def test_other_queries_are_refused() -> None:
    one = results([1, 0], [1, 0.5], 2)
    other = {"x.png": QueryResult(1, 1.0, 1.0), "0.png": one["0.png"]}
    with pytest.raises(UserError, match=r"1\.png is in one only.*EVAL\.DETAILS on"):
        paired_differences(one, other)
    with pytest.raises(UserError, match="0 queries cannot be compared with 0"):
        paired_differences({}, {})


def test_reads_what_an_evaluation_wrote(tmp_path: Path) -> None:
    rows = (
        "raw->raw,none,none,a.png,7,0,2,1,3,0.83,0.5\n"
        "raw->protected,ciphertext,aead,b.png,8,1,1,4,4,0.25,0.25\n"
    )
    (tmp_path / "per_query.csv").write_text(HEAD + rows, "utf-8")
    assert read_queries(tmp_path) == QueryTable(
        Access("ciphertext", "aead"),
        {
            "raw->raw": {"a.png": QueryResult(7, 1.0, 0.83)},
            "raw->protected": {"b.png": QueryResult(8, 0.0, 0.25)},
        },
    )


def test_a_file_name_that_is_no_utf8_comes_back(tmp_path: Path) -> None:
    """It must not cost the details of an evaluation at its very end."""
    path = os.fsdecode(b"/data/caf\xe9_c1.jpg")
    query, gallery = (Features(torch.eye(2), [7, 8], [camera] * 2) for camera in (0, 1))
    details = {"raw->raw": score_details(query, gallery)}
    samples = [Sample(name, pid, 0, "s") for name, pid in ((path, 7), ("b.jpg", 8))]
    save_details(details, Access(), samples, tmp_path)
    assert set(read_queries(tmp_path).directions["raw->raw"]) == {path, "b.jpg"}


def test_a_missing_or_foreign_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"per_query\.csv do not exist; evaluate both"):
        read_queries(tmp_path)
    for text in (
        "name,value\na,1\n",
        HEAD + "raw->raw,none,none,a.png\n",
        HEAD + "raw->raw,none,none,a,x,0,2,1,3,1,1\n",
        HEAD
        + "raw->protected,right,aead,a,1,0,2,1,3,1,1\n"
        + "raw->protected,ciphertext,aead,b,1,0,2,1,3,1,1\n",
    ):
        (tmp_path / "per_query.csv").write_text(text, "utf-8")
        with pytest.raises(UserError, match="not a table of per-query results"):
            read_queries(tmp_path)


def test_the_mean_over_trainings_is_taken_query_by_query() -> None:
    opened = Access("right", "aead")
    tables = [
        QueryTable(opened, {"raw->raw": results([1, 0], [0.9, 0.1], 2)}),
        QueryTable(opened, {"raw->raw": results([0, 0], [0.5, 0.3], 2)}),
        QueryTable(opened, {"raw->raw": results([1, 0], [0.4, 0.2], 2)}),
    ]
    assert mean_of(tables).access == opened
    found = mean_of(tables).directions["raw->raw"]
    assert found["0.png"].rank1 == pytest.approx(2 / 3)
    assert found["0.png"].average_precision == pytest.approx(0.6)
    assert found["1.png"] == QueryResult(1, 0.0, pytest.approx(0.2))
    same = tables[0].directions
    for other in ({"raw->raw": results([1], [1], 1)}, {"raw->protected": same["raw->raw"]}):
        with pytest.raises(UserError, match="different queries"):
            mean_of([tables[0], QueryTable(opened, other)])
    with pytest.raises(UserError, match=r"key right, scheme aead and with key none.*with the same"):
        mean_of([tables[0], QueryTable(Access(), same)])
