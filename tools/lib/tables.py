"""Tables of results: differences on the same queries; means over seeds and published numbers."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from configs.published import TOLERANCE, published_rank1
from engine.details import DETAILS_NAME
from engine.report import DIRECTIONS, Results, Spread
from engine.scoring.intervals import (
    Access,
    Interval,
    access_warning,
    mean_of,
    paired_differences,
    read_queries,
)
from tools.lib.run import Experiment
from utils.errors import UserError

_NAMES = tuple("->".join(direction) for direction in DIRECTIONS)
_IMAGES = ("desensitized", "anonymized", "recovered")


@dataclass(frozen=True)
class Row:
    """A method on a data set with one strength of a desensitizer."""

    dataset: str
    desensitizer: str
    radius: float
    method: str
    experiments: Mapping[int, Experiment]  # experiments by seed
    # In words, values that differ from the published training. If there are any, the row is not
    # compared with published numbers.
    deviations: tuple[str, ...] = ()

    def finished(self) -> dict[int, Results]:
        """Return the results of finished experiments, by seed."""
        finished = {seed: e for seed, e in self.experiments.items() if e.is_finished}
        return {seed: experiment.results() for seed, experiment in finished.items()}

    def published(self) -> tuple[float, ...] | None:
        """Return the published rank-1 in [0, 1]; None without a published value."""
        rates = published_rank1(self.dataset, self.method, self.desensitizer)
        return None if self.deviations else rates


@dataclass(frozen=True)
class Summary:
    """Results of a row."""

    row: Row  # the row
    results: Mapping[int, Results]  # results by seed, of at least one finished seed

    def values(self, score: str, name: str) -> list[float]:
        """Return a score of each seed, one of the fields of ``Results``.

        The name identifies a direction or a kind of image.
        """
        return [getattr(results, score)[name] for results in self.results.values()]

    def off(self) -> list[float] | None:
        """Return mean minus published rank-1 in points; None if nothing is published."""
        published = self.row.published()
        if published is None:
            return None
        return [
            100 * (fmean(self.values("rank1", name)) - rate)
            for name, rate in zip(_NAMES, published, strict=True)
        ]

    @property
    def agrees(self) -> bool:
        """Whether no mean is farther from the published number than the tolerance."""
        return all(abs(off) <= TOLERANCE[self.row.dataset] for off in self.off() or ())

    def to_json(self) -> dict[str, Any]:
        """Return the numbers for scripts, rates in [0, 1]."""
        row, published = self.row, self.row.published()
        directions = {
            name: {
                "rank1": self.values("rank1", name),
                "mAP": self.values("mAP", name),
                "rank1_published": None if published is None else published[index],
            }
            for index, name in enumerate(_NAMES)
        }
        return {
            "dataset": row.dataset,
            "desensitizer": row.desensitizer,
            "radius": row.radius,
            "method": row.method,
            "seeds": list(self.results),
            "retrieval": directions,
            "tolerance_points": TOLERANCE.get(row.dataset) if published is not None else None,
            "agrees": self.agrees if published is not None else None,
            "folders": {seed: str(row.experiments[seed].test_folder) for seed in self.results},
        }


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Return the summaries of all rows with at least one finished seed.

    Raises:
        UserError: Results are damaged.
    """
    finished = [Summary(row, row.finished()) for row in rows]
    return [summary for summary in finished if summary.results]


def markdown(table: Sequence[Summary]) -> str:
    """Return Markdown with a section for each data set and desensitizer."""
    sections = groupby(table, lambda s: f"{s.row.dataset}, {s.row.desensitizer} {s.row.radius:g}")
    return "\n\n".join(_section(title, list(group)) for title, group in sections) + "\n"


def _section(title: str, group: Sequence[Summary]) -> str:
    parts = [
        f"## {title}",
        "Rank-1 / mAP in %, query -> gallery; mean ± standard deviation over seeds",
        _aligned(
            ("method", "seeds", *_NAMES), [cells for summary in group for cells in _rates(summary)]
        ),
        "Images against raw: PSNR, SSIM",
        _aligned(("method", *_IMAGES), [_images(summary) for summary in group]),
    ]
    if len(group) > 1:
        compared = [_compared(*pair) for pair in pairwise(group)]
        parts += [
            "Points on the same queries, mean over seeds [95 % interval over people], and the "
            "number of seeds in which it is above 0",
            _aligned(("difference", *_NAMES), [cells for lines, _ in compared for cells in lines]),
            *(warning for _, warning in compared if warning),
        ]
    notes = [text for s in group for text in (_not_compared(s.row), _mixed_versions(s)) if text]
    parts += notes
    return "\n\n".join(parts)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns, which is also readable as text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "| " + " | ".join(map(str.ljust, cells, widths)) + " |"
        for cells in (head, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(lines)


def _rates(summary: Summary) -> list[tuple[str, ...]]:
    """Return a row of scores and, if anything is published, rows of published numbers."""
    scores = (
        " / ".join(Spread.of(summary.values(s, n)).text(scale=100) for s in ("rank1", "mAP"))
        for n in _NAMES
    )
    lines = [(summary.row.method, ", ".join(map(str, summary.results)), *scores)]
    published, off = summary.row.published(), summary.off()
    if published is not None and off is not None:
        allowed = TOLERANCE[summary.row.dataset]
        lines.append(("published", "", *(f"{100 * rate:.1f}" for rate in published)))
        marks = (f"{points:+.1f}{'' if abs(points) <= allowed else ' !'}" for points in off)
        lines.append((f"off by (! above {allowed:g})", "", *marks))
    return lines


def _images(summary: Summary) -> tuple[str, ...]:
    cells = []
    for kind in _IMAGES:
        if all(kind in results.psnr_db for results in summary.results.values()):
            psnr_db, ssim = (Spread.of(summary.values(s, kind)) for s in ("psnr_db", "ssim"))
            cells.append(f"{psnr_db.text()} dB, {ssim.text(2)}")
        else:
            cells.append("")
    return (summary.row.method, *cells)


def _compared(first: Summary, second: Summary) -> tuple[list[tuple[str, ...]], str]:
    """Return rows of second minus first in rank-1 and mAP, over the seeds that both have.

    Also returns in words what differs in addition to the methods.
    """
    seeds = [seed for seed in first.results if seed in second.results]
    if not seeds:
        return [], ""
    before, after = (
        mean_of([read_queries(summary.row.experiments[seed].test_folder) for seed in seeds])
        for summary in (first, second)
    )
    by_direction = [paired_differences(before.directions[n], after.directions[n]) for n in _NAMES]
    lines = []
    for score, label in (("rank1", "rank-1"), ("mAP", "mAP")):
        ahead = [
            sum(getattr(second.results[s], score)[name] > getattr(first.results[s], score)[name]
                for s in seeds)
            for name in _NAMES
        ]  # fmt: skip
        cells = (
            f"{points(intervals[score])}, {count} of {len(seeds)}"
            for intervals, count in zip(by_direction, ahead, strict=True)
        )
        lines.append((f"{second.row.method} - {first.row.method}, {label}", *cells))
    return lines, access_warning({first.row.method: before, second.row.method: after})


def _not_compared(row: Row) -> str:
    if not row.deviations or published_rank1(row.dataset, row.method, row.desensitizer) is None:
        return ""
    more = f" and {len(row.deviations) - 3} more" if len(row.deviations) > 3 else ""
    return (
        f"{row.method} is not compared with the published numbers because its values differ: "
        f"{', '.join(row.deviations[:3])}{more}"
    )


def _mixed_versions(summary: Summary) -> str:
    """Name precisions or torch versions that differ between seeds and add to the spread."""
    versions = {
        name: sorted({r.versions.get(name, "unknown") for r in summary.results.values()})
        for name in ("precision", "torch")
    }
    mixed = [f"{name} {' and '.join(each)}" for name, each in versions.items() if len(each) > 1]
    return f"{summary.row.method} mixes {', '.join(mixed)} over its seeds" if mixed else ""


@dataclass(frozen=True)
class Difference:
    """The change of one direction from an evaluation to the next one."""

    direction: str  # such as ``raw->protected``
    before: str  # name of the first evaluation
    after: str  # name of the second evaluation
    # change of ``rank1`` and ``mAP`` with 95 % intervals over identities
    intervals: Mapping[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """Differences of evaluations on the same queries."""

    access: Mapping[str, Access]  # with which keys each evaluation read protected images, by name
    warning: str  # a sentence if these differ, else ''
    # of each evaluation from the one before it, direction by direction
    differences: Sequence[Difference]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Comparison:
        """Compare evaluations.

        Raises:
            UserError: A folder contains no per-query results, or the queries or rules differ.
        """
        _check_rules(folders)
        tables = {folder: read_queries(folder) for folder in folders}
        names = _names(folders)
        differences = []
        for query, gallery in DIRECTIONS:
            direction = f"{query}->{gallery}"
            for before, after in pairwise(folders):
                sides = [tables[folder].directions.get(direction, {}) for folder in (before, after)]
                change = paired_differences(*sides)
                differences.append(Difference(direction, names[before], names[after], change))
        return cls(
            {names[folder]: table.access for folder, table in tables.items()},
            access_warning({str(folder): table for folder, table in tables.items()}),
            differences,
        )

    def table(self) -> str:
        """Return the differences as text."""
        read = "; ".join(f"{name}: {access}" for name, access in self.access.items())
        lines = [f"protected images of {read}", *([self.warning] if self.warning else [])]
        head = "points on the same queries, 95 % over people"
        lines.append(f"{head:<46}{'rank-1':>24}{'mAP':>24}")
        for direction, group in groupby(self.differences, key=lambda each: each.direction):
            lines.append(f"  {direction}")
            for each in group:
                cells = "".join(f"{points(i):>24}" for i in each.intervals.values())
                lines.append(f"{f'    {each.after} - {each.before}':<46}{cells}")
        lines.append(
            "An interval that contains 0 shows no difference; more people or seeds may show one."
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the same for scripts, rates in [0, 1]."""
        return asdict(self)


def _check_rules(folders: Sequence[Path]) -> None:
    """Raise if the evaluations counted matches by different rules, or in different galleries."""
    for rule, title in (
        ("cross_camera", "TEST.CROSS_CAMERA differs"),
        ("num_gallery", "the number of gallery images differs"),
    ):
        values: dict[int, Path] = {}
        for folder in folders:
            # Files that this program did not write are skipped.
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                content = json.loads((folder / DETAILS_NAME).read_text("utf-8"))
                values.setdefault(content["raw->raw"][rule], folder)
        if len(values) > 1:
            given = " and ".join(
                f"{folder} with {value}" for value, folder in sorted(values.items())
            )
            raise UserError(f"{title}: {given}; evaluate both with the same data and configuration")


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the last part of each path without ``-test``; the path if two would be the same."""
    short = {folder: folder.name.removesuffix("-test") for folder in folders}
    times = Counter(short.values())
    return {f: name if name and times[name] == 1 else str(f) for f, name in short.items()}


def points(interval: Interval) -> str:
    """Return a difference of rates with its interval, in points: ``+12.0 [+8.8, +15.2]``."""
    value, low, high = (100 * bound for bound in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
