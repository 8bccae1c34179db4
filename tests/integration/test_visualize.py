"""tools/visualize.py on a tiny model, and the report of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from yacs.config import CfgNode

from tests.fixtures import tiny
from tools import visualize
from utils.errors import UserError


@pytest.fixture
def trained() -> Path:
    """Return the output folder of a tiny training."""
    return tiny.finished("SOLVER.MAX_EPOCHS", "1")


def draw(trained: Path, output: Path, kind: str, *options: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(patch)
        return visualize.main(
            [kind, str(trained), "--split", "val", "--output", str(output), *options]
        )


def test_ranked_lists_of_every_direction(trained: Path, tmp_path: Path) -> None:
    assert draw(trained, tmp_path, "ranks", "--each", "1", "--top", "4") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        f"ranks_{a}-{b}.png" for a in ("protected", "raw") for b in ("protected", "raw")
    ]
    heights = {Image.open(tmp_path / name).height for name in names}
    assert len(heights) == 1


def test_one_direction_of_random_queries(trained: Path, tmp_path: Path) -> None:
    options = ("--direction", "raw->protected", "--random", "2", "--key", "ciphertext")
    assert draw(trained, tmp_path, "ranks", *options) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ranks_raw-protected.png"]


def test_strips_have_a_column_for_every_stage(trained: Path, tmp_path: Path) -> None:
    assert draw(trained, tmp_path, "strips", "--random", "1") == 0
    with Image.open(tmp_path / "strips.png") as image:
        pixels = np.array(image)
    columns = (pixels[22:-6] < 250).any(axis=(0, 2))
    assert np.count_nonzero(np.diff(columns.astype(int)) == 1) == 7


def test_maps(trained: Path, tmp_path: Path) -> None:
    assert draw(trained, tmp_path, "maps", "--random", "2") == 0
    assert (tmp_path / "maps.png").is_file()


def test_a_query_by_name(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(trained, tmp_path, "maps", "--query", "nothing.jpg") == 2
    error = capsys.readouterr().err
    assert "0 of" in error and "'nothing.jpg'" in error
    name = error.split("such as '")[1].split("'")[0]
    assert draw(trained, tmp_path, "maps", "--query", name) == 0


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ([], "test"),
        (["EVAL.SPLIT", "val"], "val"),
        (["--split", "test", "EVAL.SPLIT", "val"], "test"),
    ],
)
def test_the_split_of_the_option_or_the_key_is_drawn(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], split: str
) -> None:
    drawn: list[str] = []

    def drawing(cfg: CfgNode, _: Path) -> None:
        drawn.append(cfg.EVAL.SPLIT)
        raise UserError("drawn")

    monkeypatch.setattr(visualize, "Drawing", drawing)
    assert visualize.main(["maps", str(trained), "--output", str(tmp_path), *given]) == 2
    assert drawn == [split]


@pytest.mark.parametrize("option", ["--top", "--each"])
def test_options_without_effect_are_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        draw(tmp_path, tmp_path, "strips", option, "3")
    assert f"{option} has no effect on strips" in capsys.readouterr().err


def test_a_run_writes_its_report() -> None:
    folder = tiny.finished("SOLVER.MAX_EPOCHS", "1", "EVAL.REPORT", "on")
    page = (folder / "report.html").read_text("utf-8")
    assert "When was the supervision upgraded?" in page
    assert page.count("data:image/png") == 5  # stages, and ranked lists of four directions
    assert "report.html" in (folder / "log.txt").read_text("utf-8")


def test_a_report_that_cannot_be_written_does_not_fail_the_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "attacks").mkdir(parents=True)
    (tmp_path / "run" / "attacks" / "results.json").write_text("{")
    with pytest.MonkeyPatch.context() as patch:
        tiny.install(patch)
        folder = tiny.run(tmp_path, "SOLVER.MAX_EPOCHS", "1", "EVAL.REPORT", "on")
    assert (folder / "results.json").is_file() and not (folder / "report.html").exists()
    assert "No report was written" in (folder / "log.txt").read_text("utf-8")
