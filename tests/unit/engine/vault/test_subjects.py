"""Subject rules: folders, patterns and tables as people write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.vault.subjects import check_dataset, subject_rule
from modeling.encryption.ised_errors import BadInput, UsageError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "subjects.csv"


def test_a_table_written_by_a_spreadsheet_is_read(table: Path) -> None:
    table.write_text("path,subject\r\na/1.png,Zoë\r\n", encoding="utf-8-sig")  # with a BOM
    rule = subject_rule("csv", "set", table=table)
    assert rule("a/1.png") == "set/Zoë"
    with pytest.raises(BadInput, match="add a line"):
        rule("a/2.png")


def test_an_image_with_two_subjects_is_rejected(table: Path) -> None:
    table.write_text("path,subject\na.png,anna\na.png,anna\nb.png,ben\na.png,ben\n")
    with pytest.raises(UsageError, match=r"line 5 gives 'a\.png' a second subject"):
        subject_rule("csv", "set", table=table)


@pytest.mark.parametrize("source", ["folder", "regex", "none"])
def test_a_table_that_would_be_ignored_is_rejected(source: str, table: Path) -> None:
    with pytest.raises(UsageError, match="--subject-csv needs --subject-from csv"):
        subject_rule(source, "set", table=table)


@pytest.mark.parametrize("source", ["folder", "csv", "none"])
def test_a_pattern_that_would_be_ignored_is_rejected(source: str) -> None:
    with pytest.raises(UsageError, match="--subject-regex needs --subject-from regex"):
        subject_rule(source, "set", pattern=r"_c(\d)")


@pytest.mark.parametrize(
    ("source", "pattern", "words"),
    [
        ("folders", None, "expected one of folder, regex, csv, none"),
        ("regex", "(", "not a regular expression"),
        ("regex", "a", "has no group"),
        ("csv", None, "needs --subject-csv FILE"),
    ],
)
def test_invalid_rules_are_rejected(source: str, pattern: str | None, words: str) -> None:
    given = {} if pattern is None else {"pattern": pattern}
    with pytest.raises(UsageError, match=words):
        subject_rule(source, "set", **given)


def test_images_without_a_subject_are_rejected() -> None:
    with pytest.raises(BadInput, match="not in a subfolder"):
        subject_rule("folder", "set")("a.png")
    with pytest.raises(BadInput, match="does not match the path"):
        subject_rule("regex", "set")("a.png")
    assert subject_rule("regex", "set")("x/0002_c1s1_000451_03.jpg") == "set/0002"
    assert subject_rule("none", "set")("a.png") == "set/picture:a.png"


def test_paths_and_patterns_are_compared_in_composed_form(table: Path) -> None:
    composed, decomposed = "Zo\u00eb", "Zoe\u0308"
    lines = [f"{composed}/1.png,{decomposed}", f"{decomposed}/1.png,{composed}"]
    table.write_text("\n".join(["path,subject", *lines]), encoding="utf-8")
    rule = subject_rule("csv", "set", table=table)
    assert rule(f"{composed}/1.png") == rule(f"{decomposed}/1.png") == f"set/{composed}"
    rule = subject_rule("regex", "set", pattern=rf"({composed})")
    assert rule(f"{composed}/1.png") == rule(f"{decomposed}/1.png") == f"set/{composed}"


@pytest.mark.parametrize("accent", ["\u0301", r"\u0301"])
def test_a_pattern_is_not_composed(accent: str) -> None:
    """Composing the set of e and an accent would make it the set of another letter."""
    rule = subject_rule("regex", "set", pattern=f"^([e{accent}]+)/")
    assert rule("e/1.png") == "set/e"
    assert rule("e\u0301/1.png") == "set/e\u0301"  # matches only in the given form
    with pytest.raises(BadInput, match="does not match the path"):
        rule("\u00e9/1.png")


def test_a_pattern_is_searched_in_the_composed_path_first() -> None:
    rule = subject_rule("regex", "set", pattern=r"^(\w)")
    assert rule("e\u0301/1.png") == "set/\u00e9"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "x/B", "a\nb", " x", "x ", "x\u200b", "\udcff", "a\0b"]
)
def test_data_set_names_that_make_labels_ambiguous_are_rejected(name: str) -> None:
    """Dataset x/B with folder C would have the label, and the key, of dataset x, folder B/C."""
    with pytest.raises(UsageError, match="data set name"):
        subject_rule("folder", name)
    check_dataset("Zoe\u0308's photos, 2026 (1)")


def test_the_default_pattern_reads_the_file_name_only() -> None:
    rule = subject_rule("regex", "set")
    assert rule("0001_c1/0002_c1s1.png") == "set/0002"
    with pytest.raises(BadInput, match="does not match"):
        rule("0001_c1/image.png")


@pytest.mark.parametrize(
    "columns", ["path,subject,subject", "path,path,subject", "path", "path;subject"]
)
def test_a_table_without_exactly_the_two_columns_is_rejected(table: Path, columns: str) -> None:
    table.write_text(f"{columns}\na.png,anna,ben\n")
    with pytest.raises(UsageError, match="once each"):
        subject_rule("csv", "set", table=table)


def test_a_line_with_too_many_cells_is_rejected(table: Path) -> None:
    table.write_text("path,subject\na.png,anna\nb.png,Smith, John\n")
    with pytest.raises(UsageError, match="line 3 has more cells"):
        subject_rule("csv", "set", table=table)


@pytest.mark.parametrize("subject", ["", " ", "\u200b"])
def test_an_empty_subject_is_rejected(table: Path, subject: str) -> None:
    table.write_text(f"path,subject\na.png,{subject}\n")
    with pytest.raises(BadInput, match="the subject is empty"):
        subject_rule("csv", "set", table=table)("a.png")


def test_blanks_around_a_subject_in_a_table_do_not_count(table: Path) -> None:
    table.write_text("path,subject\na.png,anna \na.png,anna\u200b\nb.png,anna\u00a0\n")
    rule = subject_rule("csv", "set", table=table)
    assert rule("a.png") == rule("b.png") == "set/anna"


def test_a_table_that_is_a_pipe_is_rejected_without_waiting(table: Path) -> None:
    os.mkfifo(table)
    with pytest.raises(UsageError, match="not a regular file"):
        subject_rule("csv", "set", table=table)


def test_a_table_that_is_too_large_is_rejected_before_it_is_read(table: Path) -> None:
    table.touch()
    os.truncate(table, 1 << 40)
    with pytest.raises(UsageError, match="larger than 256 MiB"):
        subject_rule("csv", "set", table=table)
