"""Your own images in a table: ``csv:FILE`` with the columns path, pid, camid and split."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data import problems as wrong
from data.datasets.folder import not_there, resolve
from data.datasets.layout import (
    JUNK_PID,
    SUBSETS,
    LoadedData,
    LoadRequest,
    pid_of_text,
    split_of,
    subject_of,
    whole_number,
    without_decimals,
)
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample
from utils.files import composed, existing_path

COLUMNS = ("path", "pid", "camid", "split")


class _Identities:
    """How identities are written in a table."""

    def __init__(self) -> None:
        self.written: dict[int, str] = {}  # first text by pid
        self.decimals: list[str] = []  # texts of numbers with decimals
        self.integers: list[str] = []  # texts of numbers without decimals


def load(request: LoadRequest) -> LoadedData:
    """Load ``csv:FILE``; relative image paths start at the folder of the table.

    ``split`` is train, query, gallery, val_query or val_gallery, and rows with train are needed for
    training only. ``camid`` is a whole number. ``pid`` is a whole number or a name; pid -1 is junk
    and is dropped. Numbers may have decimals of zero (7.0), as pandas writes them.

    Raises:
        DatasetError: A column, a value or an image is wrong; the text contains the line.
    """
    table = resolve(request)
    if not table.is_file():
        raise not_there(request, f"{table} is not a file")
    parts: dict[str, list[Sample]] = {subset: [] for subset in SUBSETS}
    identities = _Identities()
    missing = []
    for line, row in _rows(table):
        sample, subset = _sample(table, line, row, identities)
        if sample.pid == JUNK_PID:
            continue
        parts[subset].append(sample)
        if not Path(sample.path).is_file():
            missing.append(f"line {line}: {sample.path}")
    if missing:
        raise DatasetError(
            "images-missing",
            f"{len(missing)} images of {table} do not exist ({wrong.examples(missing)}); relative "
            "paths start at the folder of the table",
        )
    lacking = [subset for subset in ("query", "gallery") if not parts[subset]]
    if lacking:
        raise DatasetError(
            "missing-split", f"{table} has no row with split {' or '.join(lacking)}; add some"
        )
    ordered = {subset: tuple(sorted(rows, key=lambda s: s.path)) for subset, rows in parts.items()}
    return LoadedData(
        DatasetSplits(request.name, **ordered, notes={"layout": "table"}),
        composed(table.stem),
        "table",
        table,
        problems=tuple(_problems(table, ordered, identities)),
        identity_names={
            pid: text for pid, text in identities.written.items() if whole_number(text) is None
        },
    )


def _problems(
    table: Path, parts: dict[str, tuple[Sample, ...]], identities: _Identities
) -> Iterator[Problem]:
    times = Counter(sample.path for samples in parts.values() for sample in samples)
    repeated = [path for path, count in times.items() if count > 1]
    if repeated:
        text = (
            f"{len(repeated)} images are in several rows of {table} ({wrong.examples(repeated)}); "
            "keep one row of each"
        )
        yield Problem("same-image-twice", text)
    if identities.decimals and identities.integers:
        text = (
            f"{table} writes some pids with decimals ({wrong.examples(identities.decimals)}) and "
            f"others without ({wrong.examples(identities.integers)}); 7.0 and 7 are one identity"
        )
        yield Problem("mixed-numbers", text)


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """Return the rows with their line numbers; the first line contains the column names."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                raise DatasetError(
                    "missing-column",
                    f"{table} lacks the column {', '.join(lacking)}; its first line must contain "
                    f"{','.join(COLUMNS)} (found {','.join(reader.fieldnames or ()) or 'nothing'})",
                )
            return [
                (reader.line_num, {k: (row[k] or "").strip() for k in COLUMNS}) for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError("bad-table", f"{table} is not a UTF-8 table ({error})") from error


def _sample(
    table: Path, line: int, row: dict[str, str], identities: _Identities
) -> tuple[Sample, str]:
    subset = row["split"]
    if subset not in SUBSETS:
        raise DatasetError(
            "bad-value",
            f"{table} line {line}: split is {subset!r}; expected one of {', '.join(SUBSETS)}",
        )
    camera = whole_number(without_decimals(row["camid"]))
    if not row["path"] or not row["pid"] or camera is None:
        raise DatasetError(
            "bad-value",
            f"{table} line {line}: path is {row['path']!r}, pid {row['pid']!r}, camid "
            f"{row['camid']!r}; expected a path, a number or name, and a number from 0",
        )
    pid = _pid(table, line, row["pid"], identities)
    path = existing_path(table.parent / row["path"])
    subject = subject_of(composed(table.stem), split_of(subset), pid)
    return Sample(str(path), pid, camera, subject), subset


def _pid(table: Path, line: int, text: str, identities: _Identities) -> int:
    number = without_decimals(composed(text))
    if number != composed(text):
        identities.decimals.append(text)
    elif number.isdigit():
        identities.integers.append(text)
    pid = pid_of_text(number)
    written = identities.written.setdefault(pid, number)
    if not written.isdigit() and written != number:
        raise DatasetError(
            "same-person-twice", f"{table} line {line}: {written!r} and {number!r} are one identity"
        )
    return pid
