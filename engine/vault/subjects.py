"""Subject labels: the same subject however its letters are put together.

Unicode writes "é" as one character or as "e" with an accent; file systems and keyboards differ in
which they give. Labels are composed (NFC) before a key is made for them. Keyrings may hold labels
from before that, so a subject is looked for under its other spellings as well.

Whose key a picture is sealed under: from its folder, its name, a table, or a key of its own.

The keyring takes spellings of one label for one subject; here paths and tables are
composed before they are compared, as file systems and editors spell accents differently.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from modeling.encryption.ised_errors import BadInput, UsageError

_MAX_BYTES = 1024


def composed(text: str) -> str:
    r"""Return text in NFC.

    Example:
        >>> composed("Zoe\u0308") == "Zo\u00eb"
        True
    """
    return unicodedata.normalize("NFC", text)


def any_label(label: str) -> str:
    """Return a label composed, however long: composing lengthens some (U+0958).

    Raises:
        BadInput: It is empty, or no text.
    """
    label = composed(label)
    try:
        encoded = label.encode()
    except UnicodeEncodeError:
        raise BadInput(f"subject label {label!a} is not valid UTF-8") from None
    if not encoded or b"\0" in encoded:
        raise _no_label(encoded)
    return label


def checked_label(label: str) -> str:
    """Return a label as new keys bear it.

    Raises:
        BadInput: It is empty, too long, or no text.
    """
    label = any_label(label)
    encoded = label.encode()
    if len(encoded) > _MAX_BYTES:
        raise _no_label(encoded)
    return label


def spellings(label: str) -> list[str]:
    """Return a label as new keys bear it, and then as others may: decomposed, and as given.

    Raises:
        BadInput: It is empty, or no text.
    """
    return list(dict.fromkeys((any_label(label), unicodedata.normalize("NFD", label), label)))


def _no_label(encoded: bytes) -> BadInput:
    return BadInput(f"subject label of {len(encoded)} bytes; expected 1 to {_MAX_BYTES}, no NUL")


SUBJECT_SOURCES = ("folder", "regex", "csv", "none")
DEFAULT_PATTERN = r"(?:^|/)(?P<subject>-?\d+)_c\d"  # names as in Market-1501

SubjectOf = Callable[[str], str]


def subject_rule(
    source: str, dataset: str, *, pattern: str = DEFAULT_PATTERN, table: Path | None = None
) -> SubjectOf:
    """Return the function from a relative path to a subject label ``dataset/subject``.

    Args:
        source: ``folder`` (the folder that holds the picture), ``regex``, ``csv`` (columns path
            and subject), or ``none``: every picture has a key of its own.
        dataset: Keeps the labels of two data sets apart.
        pattern: Regular expression, searched in the relative path, composed, or else as it is; its
            group ``subject``, or else its first group, is the subject.
        table: The CSV file.

    Raises:
        UsageError: The source is unknown or another than the pattern or table is for, the pattern
            is none, or the table cannot be used.
    """
    rules: dict[str, Callable[[], SubjectOf]] = {
        "folder": lambda: _by_folder,
        "regex": lambda: _by_pattern(pattern),
        "csv": lambda: _by_table(table),
        "none": lambda: lambda path: f"picture:{path}",
    }
    if source not in rules:
        raise UsageError(
            f"--subject-from is {source!r}; expected one of {', '.join(SUBJECT_SOURCES)}"
        )
    for option, given, reader in (
        ("--subject-regex", pattern != DEFAULT_PATTERN, "regex"),
        ("--subject-csv", table is not None, "csv"),
    ):
        if given and source != reader:
            raise UsageError(f"{option} needs --subject-from {reader}; got --subject-from {source}")
    rule = rules[source]()
    return lambda path: f"{dataset}/{rule(path)}"


def _by_folder(path: str) -> str:
    """Return the folder of a picture."""
    folder = str(PurePosixPath(path).parent)
    if folder == ".":
        raise BadInput(
            "lies in no sub-folder that could name a subject; use --subject-from regex, csv or none"
        )
    return folder


def _by_pattern(pattern: str) -> SubjectOf:
    """Return the rule of a regular expression."""
    try:
        compiled = re.compile(pattern)  # as given: composing changes sets
    except re.error as error:
        raise UsageError(f"--subject-regex {pattern!r} is no regular expression: {error}") from None
    if not compiled.groups:
        raise UsageError(f"--subject-regex {pattern!r} has no group; write (?P<subject>...)")
    group: str | int = "subject" if "subject" in compiled.groupindex else 1

    def rule(path: str) -> str:
        for spelling in (composed(path), path):
            match = compiled.search(spelling)
            if match is not None and match[group]:
                return match[group]
        raise BadInput(f"no subject found by --subject-regex {pattern!r}")

    return rule


def _by_table(table: Path | None) -> SubjectOf:
    """Return the rule of a CSV file."""
    if table is None:
        raise UsageError("--subject-from csv needs --subject-csv FILE with columns path, subject")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark
            reader = csv.DictReader(file)
            if not {"path", "subject"} <= set(reader.fieldnames or ()):
                raise UsageError(
                    f"{table}: expected the columns path and subject in its first line"
                )
            subjects: dict[str, str] = {}
            for row in reader:
                subject = composed(row["subject"] or "")
                if subjects.setdefault(composed(row["path"] or ""), subject) != subject:
                    raise UsageError(
                        f"{table}: line {reader.line_num} gives {row['path']!r} a second subject"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table}: cannot be read as CSV ({error})") from None

    def rule(path: str) -> str:
        subject = subjects.get(composed(path))
        if not subject:
            raise BadInput(f"not in {table}; add a line for it")
        return subject

    return rule
