from __future__ import annotations

from pathlib import Path

import pytest

from tools import compare

HEAD = "direction,path,pid,first_rank,average_precision\n"
DIRECTIONS = ("raw->raw", "raw->protected", "protected->raw", "protected->protected")


def folder(root: Path, name: str, first_rank: int, ap: float) -> str:
    rows = [f"{way},{q}.png,{q % 3},{first_rank},{ap}\n" for way in DIRECTIONS for q in range(6)]
    (root / name).mkdir()
    (root / name / "per_query.csv").write_text(HEAD + "".join(rows), "utf-8")
    return str(root / name)


def test_each_is_compared_with_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        folder(tmp_path, "base-test", 2, 0.5),
        folder(tmp_path, "without-test", 1, 0.75),
        folder(tmp_path, "full-test", 1, 0.7),
    ]
    assert compare.main(names) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines].count(
        ["without", "-", "base", "+100.0", "[+100.0,", "+100.0]", "+25.0", "[+25.0,", "+25.0]"]
    ) == len(DIRECTIONS)
    assert sum("full - without" in line and "-5.0 [-5.0, -5.0]" in line for line in lines) == 4


def test_wrong_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = folder(tmp_path, "whole", 1, 1.0)
    assert compare.main([whole, str(tmp_path)]) == 2
    assert "EVAL.DETAILS on" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        compare.main([whole])
    assert stop.value.code == 2
    assert "expected two or more" in capsys.readouterr().err
