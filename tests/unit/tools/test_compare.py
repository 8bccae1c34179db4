from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import compare

HEAD = "direction,key,scheme,path,pid,first_rank,average_precision\n"
DIRECTIONS = ("raw->raw", "raw->protected", "protected->raw", "protected->protected")


def folder(root: Path, name: str, first_rank: int, ap: float, read: str = "right,additive") -> str:
    rows = [
        f"{way},{read if 'protected' in way else 'none,none'},{q}.png,{q % 3},{first_rank},{ap}\n"
        for way in DIRECTIONS
        for q in range(6)
    ]
    (root / name).mkdir()
    (root / name / "per_query.csv").write_text(HEAD + "".join(rows), "utf-8")
    return str(root / name)


def test_each_is_compared_with_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        folder(tmp_path, "base-test", 2, 0.5, "none,none"),
        folder(tmp_path, "without-test", 1, 0.75),
        folder(tmp_path, "full-test", 1, 0.7),
    ]
    assert compare.main(names) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "protected images of base: key none; without: key right, scheme additive; "
        "full: key right, scheme additive"
    )
    assert [line.split() for line in lines].count(
        ["without", "-", "base", "+100.0", "[+100.0,", "+100.0]", "+25.0", "[+25.0,", "+25.0]"]
    ) == len(DIRECTIONS)
    assert sum("full - without" in line and "-5.0 [-5.0, -5.0]" in line for line in lines) == 4


def test_differences_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [folder(tmp_path, "a", 2, 0.5), folder(tmp_path, "b-test", 1, 0.75)]
    assert compare.main([*names, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["access"]["b"] == {"key": "right", "scheme": "additive"}
    assert content["warning"] == ""
    assert [each["direction"] for each in content["differences"]] == list(DIRECTIONS)
    first = content["differences"][0]
    assert (first["before"], first["after"]) == ("a", "b")
    assert first["intervals"]["mAP"] == {"value": 0.25, "low": 0.25, "high": 0.25}


def test_wrong_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = folder(tmp_path, "whole", 1, 1.0)
    assert compare.main([whole, str(tmp_path)]) == 2
    assert "EVAL.DETAILS on" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        compare.main([whole])
    assert stop.value.code == 2
    assert "expected two or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reads", "equal"),
    [
        (("none,none", "right,aead"), True),  # equal for the holder
        (("ciphertext,aead", "ciphertext,aead"), True),
        (("ciphertext,additive", "right,aead"), False),
        (("none,none", "ciphertext,additive"), False),
        (("right,additive", "right,aead"), False),
        (("ciphertext,additive", "ciphertext,aead"), False),
        (("right,additive", "none,none", "right,aead"), False),
    ],
)
def test_key_states_that_differ_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reads: tuple[str, ...], equal: bool
) -> None:
    names = [folder(tmp_path, f"run{n}", 1, 0.5, read) for n, read in enumerate(reads)]
    assert compare.main(names) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "opened in different ways" in line
    ]
    assert len(lines) == (not equal)
    for line in lines:
        for name, (key, scheme) in zip(names, (read.split(",") for read in reads), strict=True):
            listed = f"{name}: key {key}" + f", scheme {scheme}" * (key != "none")
            assert listed in line


def test_a_table_of_an_earlier_version_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [folder(tmp_path, name, 1, 1.0) for name in ("new", "old")]
    path = tmp_path / "old" / "per_query.csv"
    path.write_text("direction,path,pid,first_rank,average_precision\nraw->raw,a,1,1,1\n", "utf-8")
    assert compare.main(names) == 2
    error = capsys.readouterr().err
    assert "old/per_query.csv was written by an earlier version" in error
    assert "evaluate again with EVAL.DETAILS on" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("rule", "values", "title"),
    [
        ("cross_camera", (True, False), "TEST.CROSS_CAMERA differs"),
        ("num_gallery", (20, 8), "the number of gallery images differs"),
    ],
)
def test_other_rules_for_matches_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rule: str,
    values: tuple[int, int],
    title: str,
) -> None:
    names = [folder(tmp_path, "a", 2, 0.5), folder(tmp_path, "b", 1, 0.7)]
    for name, value in zip(names, values, strict=True):
        content = {"raw->raw": {rule: value}}
        (Path(name) / "details.json").write_text(json.dumps(content), "utf-8")
    assert compare.main(names) == 2
    error = capsys.readouterr().err
    assert f"{title}: {names[1]} with {values[1]} and {names[0]} with {values[0]}" in error


def test_folders_of_the_same_name_are_named_by_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    names = [folder(tmp_path / "x", "test", 2, 0.5), folder(tmp_path / "y", "test", 1, 0.7)]
    names.append(folder(tmp_path, "full-test", 1, 0.8))
    assert compare.main([*names, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["access"]) == [names[0], names[1], "full"]
    first = content["differences"][0]
    assert (first["before"], first["after"]) == (names[0], names[1])
