"""A table made by real trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures import tiny
from tools import reproduce
from tools.lib import run as run_module


def test_a_table_of_real_trainings_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.install(monkeypatch)
    config, *values = tiny.arguments(tmp_path, *tiny.PERMISSIVE, "SOLVER.MAX_EPOCHS", "1")
    place = values.index("OUTPUT_DIR")
    del values[place : place + 2]  # replaced by --output
    line = [config, "--methods", "base,full", "--seeds", "2", "--output", str(tmp_path), *values]
    assert reproduce.main(line) == 0
    capsys.readouterr()
    rows = json.loads((tmp_path / "reproduction.json").read_text("utf-8"))
    assert [(row["method"], row["seeds"]) for row in rows] == [("base", [2]), ("full", [2])]
    for row in rows:
        for place, folder in enumerate(row["folders"].values()):
            found = tiny.results(Path(folder))
            assert found["split"] == "test"
            published = [float(rate) for rate in found["published_row"].split("/")]
            own = [100 * one["rank1"][place] for one in row["retrieval"].values()]
            assert own == pytest.approx(published, abs=0.05)

    def never(cfg: object) -> None:
        raise AssertionError(cfg)

    monkeypatch.setattr(run_module, "run", never)
    assert reproduce.main(line) == 0
    assert "full - base, mAP" in capsys.readouterr().out
    (Path(rows[0]["folders"]["2"]) / "results.json").write_text("{", "utf-8")
    assert reproduce.main(line) == 2
    assert "results.json is not the report of an evaluation" in capsys.readouterr().err
