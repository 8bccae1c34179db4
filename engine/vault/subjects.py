"""Subject labels: whose key an image is sealed under, and how labels are compared.

Labels that look the same must be the same subject, or erasing a person would miss files. Labels are
therefore normalised (`normalized`) before a key is made. Keyrings may contain labels from before
this rule, so a subject is also looked up under its other spellings (`spellings`). Paths and tables
are composed (NFC) before they are compared.
"""

from __future__ import annotations

import csv
import math
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from modeling.encryption.ised_errors import BadInput, UsageError
from utils.files import check_regular, composed

SUBJECT_SOURCES = ("folder", "regex", "csv", "none")
# File names as in Market-1501. Folders do not count: 0001_c1/0002_c1s1.png shows person 0002.
DEFAULT_PATTERN = r"(?:^|/)(?P<subject>-?\d+)_c\d[^/]*$"

SubjectOf = Callable[[str], str]

_MAX_LABEL_BYTES = 1024
_MAX_TABLE_BYTES = 1 << 28


def normalized(label: str) -> str:
    r"""Return a label without the differences that a reader cannot see.

    Invisible format characters (such as U+200B) are removed, other white space becomes a blank,
    blanks around each part of the label are removed, and accents are composed (NFC).

    Example:
        >>> normalized("set/Zoe\u0308\u200b ") == "set/Zo\u00eb"
        True
    """
    text = label
    if not (label.isascii() and label.isprintable()):  # others need a look at every character
        visible = (char for char in label if unicodedata.category(char) != "Cf")
        text = "".join(" " if char.isspace() else char for char in visible)
    return composed("/".join(part.strip() for part in text.split("/")))


def check_dataset(name: str) -> None:
    """Raise UsageError unless a data set name can begin a label.

    A "/" is not allowed: dataset ``x/B`` with folder ``C`` and dataset ``x`` with folder ``B/C``
    would have the same label, and thus the same key.
    """
    if not name.isprintable() or "/" in name or name.strip() != name or name in ("", ".", ".."):
        raise UsageError(
            f"data set name {name!a}; expected printable text without '/' or blanks at its ends; "
            "give another --dataset"
        )


def any_label(label: str, longest: float = math.inf) -> str:
    """Return a normalised label of any length; composing lengthens some labels (U+0958).

    Raises:
        BadInput: The label is empty, contains NUL, or has no UTF-8 form.
    """
    label = normalized(label)
    try:
        encoded = label.encode()
    except UnicodeEncodeError:
        raise BadInput(f"subject label {label!a} is not valid UTF-8") from None
    if not 1 <= len(encoded) <= longest or b"\0" in encoded:
        raise BadInput(
            f"subject label of {len(encoded)} bytes; expected 1 to {_MAX_LABEL_BYTES}, no NUL"
        )
    return label


def checked_label(label: str) -> str:
    """Return the normalised label for a new key: as `any_label`, and at most 1024 bytes."""
    return any_label(label, _MAX_LABEL_BYTES)


def spellings(label: str) -> list[str]:
    """Return the forms under which a keyring may contain a label, without duplicates.

    The first is the normalised form, which new keys get. The others are those of older keyrings:
    composed, decomposed, and as given.

    Raises:
        BadInput: The label is empty, contains NUL, or has no UTF-8 form.
    """
    older = (composed(label), unicodedata.normalize("NFD", label), label)
    return list(dict.fromkeys((any_label(label), *older)))


def subject_rule(
    source: str, dataset: str, *, pattern: str = DEFAULT_PATTERN, table: Path | None = None
) -> SubjectOf:
    """Return the function from a relative path to a subject label ``dataset/subject``.

    Args:
        source: ``folder`` (the folder that contains the image), ``regex``, ``csv`` (columns path
            and subject), or ``none`` (every image gets its own key).
        dataset: Separates the labels of different data sets.
        pattern: Regular expression, searched in the composed path and then in the given path. Its
            group ``subject``, or else its first group, is the subject.
        table: The CSV file.

    Raises:
        UsageError: The source is unknown, the data set name or the pattern is invalid, the table
            cannot be used, or a pattern or table is given for a source that does not use it.
    """
    check_dataset(dataset)
    if source not in SUBJECT_SOURCES:
        raise UsageError(
            f"--subject-from is {source!r}; expected one of {', '.join(SUBJECT_SOURCES)}"
        )
    for option, given, user in (
        ("--subject-regex", pattern != DEFAULT_PATTERN, "regex"),
        ("--subject-csv", table is not None, "csv"),
    ):
        if given and source != user:
            raise UsageError(f"{option} needs --subject-from {user}; got --subject-from {source}")
    rules: dict[str, Callable[[], SubjectOf]] = {
        "folder": lambda: _by_folder,
        "regex": lambda: _by_pattern(pattern),
        "csv": lambda: _by_table(table),
        "none": lambda: lambda path: f"picture:{path}",
    }
    rule = rules[source]()

    def label(path: str) -> str:
        subject = rule(path)
        if not normalized(subject):
            raise BadInput("the subject is empty; name it")
        return f"{dataset}/{subject}"

    return label


def _by_folder(path: str) -> str:
    folder = str(PurePosixPath(path).parent)
    if folder == ".":
        raise BadInput(
            "not in a subfolder that could name a subject; use --subject-from regex, csv or none"
        )
    return folder


def _by_pattern(pattern: str) -> SubjectOf:
    try:
        compiled = re.compile(pattern)  # not composed: that would change character sets
    except re.error as error:
        raise UsageError(
            f"--subject-regex {pattern!r} is not a regular expression: {error}"
        ) from None
    if not compiled.groups:
        raise UsageError(f"--subject-regex {pattern!r} has no group; write (?P<subject>...)")
    group: str | int = "subject" if "subject" in compiled.groupindex else 1

    def rule(path: str) -> str:
        for spelling in (composed(path), path):
            match = compiled.search(spelling)
            if match is not None and match[group]:
                return match[group]
        raise BadInput(f"--subject-regex {pattern!r} does not match the path")

    return rule


def _by_table(table: Path | None) -> SubjectOf:
    if table is None:
        raise UsageError("--subject-from csv needs --subject-csv FILE with columns path, subject")
    try:
        check_regular(table)
        if table.stat().st_size > _MAX_TABLE_BYTES:
            raise UsageError(f"{table}: larger than {_MAX_TABLE_BYTES >> 20} MiB; split the input")
        # utf-8-sig: spreadsheets write a byte order mark
        with table.open(newline="", encoding="utf-8-sig") as file:
            subjects = _read_table(csv.DictReader(file), table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table}: cannot be read as CSV ({error})") from None

    def rule(path: str) -> str:
        subject = subjects.get(composed(path))
        if subject is None:
            raise BadInput(f"not in {table}; add a line for it")
        return subject

    return rule


def _read_table(reader: csv.DictReader[str], table: Path) -> dict[str, str]:
    """Return the normalised subject by composed path."""
    columns = list(reader.fieldnames or ())
    if columns.count("path") != 1 or columns.count("subject") != 1:
        raise UsageError(
            f"{table}: expected the columns path and subject once each in its first line"
        )
    subjects: dict[str, str] = {}
    for row in reader:
        line = reader.line_num
        if None in row:  # an unquoted comma would cut a subject short
            raise UsageError(
                f"{table}: line {line} has more cells than columns; put text with commas in quotes"
            )
        subject = normalized(row["subject"] or "")
        if subjects.setdefault(composed(row["path"] or ""), subject) != subject:
            raise UsageError(f"{table}: line {line} gives {row['path']!r} a second subject")
    return subjects
