"""One's own pictures in a table: ``csv:FILE`` with the columns path, pid, camid and split."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from data import problems as wrong
from data.datasets.folder import not_there, resolve
from data.datasets.layout import (
    SUBSETS,
    LoadedData,
    LoadRequest,
    pid_of_text,
    subject_of,
    whole_number,
)
from data.datasets.market1501 import JUNK_PID, split_of
from data.positives import stranger_problems
from data.problems import DatasetError, Problem
from data.records import DatasetSplits, Sample

COLUMNS = ("path", "pid", "camid", "split")


def load(request: LoadRequest) -> LoadedData:
    """Load ``csv:FILE``; relative picture paths count from the table's folder.

    ``split`` is one of train, query, gallery, val_query and val_gallery; ``camid`` a number;
    ``pid`` a number or a name; pid -1 is junk and dropped.

    Raises:
        DatasetError: A column, a value or a picture is wrong; the text names the line.
    """
    table = resolve(request)
    if not table.is_file():
        raise not_there(request, f"{table} is not a file")
    parts: dict[str, list[Sample]] = {subset: [] for subset in SUBSETS}
    numbers: dict[int, str] = {}
    missing = []
    for line, row in _rows(table):
        sample, subset = _sample(table, line, row, numbers)
        if sample.pid == JUNK_PID:
            continue
        parts[subset].append(sample)
        if not Path(sample.path).is_file():
            missing.append(f"line {line}: {sample.path}")
    if missing:
        raise DatasetError(
            "images-missing",
            f"{len(missing)} pictures of {table} do not exist ({wrong.examples(missing)}); "
            "relative paths count from the table's folder",
        )
    lacking = [subset for subset in ("train", "query", "gallery") if not parts[subset]]
    if lacking:
        raise DatasetError(
            "missing-split", f"{table} has no row with split {' or '.join(lacking)}; add some"
        )
    ordered = {subset: tuple(sorted(rows, key=lambda s: s.path)) for subset, rows in parts.items()}
    splits = DatasetSplits(
        request.name,
        train=ordered["train"],
        query=ordered["query"],
        gallery=ordered["gallery"],
        val_query=ordered["val_query"],
        val_gallery=ordered["val_gallery"],
        notes={"layout": "table"},
    )
    problems = [*stranger_problems(splits), *_listed_twice(table, splits)]
    return LoadedData(splits, table.stem, "table", table, problems=tuple(problems))


def _listed_twice(table: Path, splits: DatasetSplits) -> list[Problem]:
    """Warn of a picture that several rows name: as query and gallery it finds itself."""
    times = Counter(sample.path for subset in SUBSETS for sample in getattr(splits, subset))
    twice = [path for path, count in times.items() if count > 1]
    if not twice:
        return []
    text = (
        f"{len(twice)} pictures are in several rows of {table} ({wrong.examples(twice)}); a "
        "picture that is both query and gallery finds itself: keep one row of each"
    )
    return [Problem("same-picture-twice", text)]


def _rows(table: Path) -> list[tuple[int, dict[str, str]]]:
    """Read the rows with their line numbers; the first line names the columns."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                raise DatasetError(
                    "missing-column",
                    f"{table} lacks the column {', '.join(lacking)}; its first line has to name "
                    f"{','.join(COLUMNS)} (found {','.join(reader.fieldnames or ()) or 'nothing'})",
                )
            return [
                (reader.line_num, {k: (row[k] or "").strip() for k in COLUMNS}) for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError("bad-table", f"{table} is not a UTF-8 table ({error})") from error


def _sample(
    table: Path, line: int, row: dict[str, str], numbers: dict[int, str]
) -> tuple[Sample, str]:
    subset = row["split"]
    if subset not in SUBSETS:
        raise DatasetError(
            "bad-value",
            f"{table} line {line}: split is {subset!r}; expected one of {', '.join(SUBSETS)}",
        )
    camera = whole_number(row["camid"])
    if not row["path"] or not row["pid"] or camera is None:
        raise DatasetError(
            "bad-value",
            f"{table} line {line}: path is {row['path']!r}, pid {row['pid']!r}, camid "
            f"{row['camid']!r}; expected a path, a number or name, and a number from 0",
        )
    pid = pid_of_text(row["pid"])
    spelled = numbers.setdefault(pid, row["pid"])
    if not spelled.isdigit() and spelled != row["pid"]:
        raise DatasetError(
            "same-person-twice",
            f"{table} line {line}: {spelled!r} and {row['pid']!r} are one number",
        )
    path = table.parent / Path(row["path"]).expanduser()
    return Sample(str(path), pid, camera, subject_of(table.stem, split_of(subset), pid)), subset
