"""The table that ``tools/reproduce.py`` makes: means over seeds, published numbers, differences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from configs.published import TOLERANCE, published_rank1
from engine.report import DIRECTIONS, Results, Spread
from engine.scoring.paired import differences, mean_of, read_queries, unlike
from tools.compare import points
from tools.lib.experiment import Experiment

_NAMES = tuple("->".join(direction) for direction in DIRECTIONS)
_IMAGES = ("desensitized", "anonymized", "recovered")


@dataclass(frozen=True)
class Row:
    """A method on a data set at a strength of a desensitizer.

    Attributes:
        dataset, desensitizer, radius, method: Which cell of the published table it is.
        experiments: By seed.
        unlike: What keeps it from being compared with the published number, in words.
    """

    dataset: str
    desensitizer: str
    radius: float
    method: str
    experiments: Mapping[int, Experiment]
    unlike: tuple[str, ...] = ()

    def finished(self) -> dict[int, Results]:
        """Return the results there are, by seed."""
        return {seed: one.results() for seed, one in self.experiments.items() if one.is_finished}

    def published(self) -> tuple[float, ...] | None:
        """Return the published rank-1 in [0, 1]; None where there is none to compare with."""
        found = published_rank1(self.dataset, self.method, self.desensitizer)
        return None if self.unlike else found


@dataclass(frozen=True)
class Summary:
    """What is known of a row.

    Attributes:
        row: The row.
        results: Of finished seeds, at least one.
    """

    row: Row
    results: Mapping[int, Results]

    def rank1(self, name: str) -> Spread:
        """Return rank-1 of a direction, in [0, 1]."""
        return Spread.of([found.rank1[name] for found in self.results.values()])

    def mean_ap(self, name: str) -> Spread:
        """Return mAP of a direction, in [0, 1]."""
        return Spread.of([found.mAP[name] for found in self.results.values()])

    def quality(self, kind: str) -> tuple[Spread, Spread] | None:
        """Return PSNR (dB) and SSIM of a kind of image; None where the method makes none."""
        found = list(self.results.values())
        if kind not in found[0].psnr_db:
            return None
        return (
            Spread.of([one.psnr_db[kind] for one in found]),
            Spread.of([one.ssim[kind] for one in found]),
        )

    def off(self) -> list[float] | None:
        """Return mean minus published rank-1 in points; None where nothing is published."""
        published = self.row.published()
        if published is None:
            return None
        return [
            100 * (self.rank1(name).mean - rate)
            for name, rate in zip(_NAMES, published, strict=True)
        ]

    @property
    def agrees(self) -> bool:
        """Whether nothing published contradicts it."""
        return all(abs(off) <= TOLERANCE[self.row.dataset] for off in self.off() or ())


@dataclass(frozen=True)
class Table:
    """All rows of which at least one seed is finished.

    Attributes:
        summaries: In the order that was asked for.
    """

    summaries: Sequence[Summary]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Table:
        """Read what is finished.

        Raises:
            UserError: Results are damaged.
        """
        found = [Summary(row, row.finished()) for row in rows]
        return cls([summary for summary in found if summary.results])

    @cached_property
    def markdown(self) -> str:
        """Tables with a section for each data set and desensitizer."""
        sections = groupby(self.summaries, lambda one: _title(one.row))
        return "\n\n".join(_section(title, list(group)) for title, group in sections) + "\n"

    def json(self) -> str:
        """Return the same numbers for scripts, rates in [0, 1]."""
        return json.dumps([_as_json(summary) for summary in self.summaries], indent=2) + "\n"


def _title(row: Row) -> str:
    return f"{row.dataset}, {row.desensitizer} {row.radius:g}"


def _section(title: str, group: Sequence[Summary]) -> str:
    parts = [
        f"## {title}",
        "Rank-1 / mAP in %, query -> gallery; mean ± standard deviation over seeds",
        _aligned(("method", "seeds", *_NAMES), [cells for one in group for cells in _rates(one)]),
        "Images against raw: PSNR, SSIM",
        _aligned(("method", *_IMAGES), [_images(one) for one in group]),
    ]
    if len(group) > 1:
        compared = [_compared(*pair) for pair in pairwise(group)]
        parts += [
            "Points on the same queries, mean over seeds [95 % interval over people], and in how "
            "many seeds it is above 0",
            _aligned(("difference", *_NAMES), [cells for lines, _ in compared for cells in lines]),
            *(warning for _, warning in compared if warning),
        ]
    parts += [text for one in group for text in (_not_compared(one.row), _made_apart(one)) if text]
    return "\n\n".join(parts)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned, so that it reads well as text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "| " + " | ".join(map(str.ljust, cells, widths)) + " |"
        for cells in (head, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(lines)


def _rates(one: Summary) -> list[tuple[str, ...]]:
    """Return a row of scores and, where there are any, rows of what is published."""
    own = (f"{one.rank1(n).text(scale=100)} / {one.mean_ap(n).text(scale=100)}" for n in _NAMES)
    lines = [(one.row.method, ", ".join(map(str, one.results)), *own)]
    published, off = one.row.published(), one.off()
    if published is not None and off is not None:
        allowed = TOLERANCE[one.row.dataset]
        lines.append(("published", "", *(f"{100 * rate:.1f}" for rate in published)))
        marks = (f"{found:+.1f}{'' if abs(found) <= allowed else ' !'}" for found in off)
        lines.append((f"off by (! above {allowed:g})", "", *marks))
    return lines


def _images(one: Summary) -> tuple[str, ...]:
    found = (one.quality(kind) for kind in _IMAGES)
    cells = (f"{pair[0].text()} dB, {pair[1].text(2)}" if pair else "" for pair in found)
    return (one.row.method, *cells)


def _compared(first: Summary, second: Summary) -> tuple[list[tuple[str, ...]], str]:
    """Return second minus first in rank-1 and mAP, of the seeds that both have.

    Returns:
        The rows, none where they share no seed; and in words what else differs than the methods.
    """
    seeds = [seed for seed in first.results if seed in second.results]
    if not seeds:
        return [], ""
    before, after = (
        mean_of([read_queries(one.row.experiments[seed].test_folder) for seed in seeds])
        for one in (first, second)
    )
    found = [differences(before.directions[name], after.directions[name]) for name in _NAMES]
    lines = []
    for score, label in (("rank1", "rank-1"), ("mAP", "mAP")):
        ahead = [
            sum(
                getattr(second.results[seed], score)[name]
                > getattr(first.results[seed], score)[name]
                for seed in seeds
            )
            for name in _NAMES
        ]
        cells = (
            f"{points(intervals[score])}, {count} of {len(seeds)}"
            for intervals, count in zip(found, ahead, strict=True)
        )
        lines.append((f"{second.row.method} - {first.row.method}, {label}", *cells))
    return lines, unlike({first.row.method: before, second.row.method: after})


def _not_compared(row: Row) -> str:
    if not row.unlike or published_rank1(row.dataset, row.method, row.desensitizer) is None:
        return ""
    more = f" and {len(row.unlike) - 3} more" if len(row.unlike) > 3 else ""
    return (
        f"{row.method} is not compared with the published numbers, as its values are not theirs: "
        f"{', '.join(row.unlike[:3])}{more}"
    )


def _made_apart(one: Summary) -> str:
    """Say where seeds were trained in different arithmetic, which is no spread over seeds."""
    differing = {
        name: sorted({found.versions.get(name, "unknown") for found in one.results.values()})
        for name in ("precision", "torch")
    }
    told = [f"{name} {' and '.join(both)}" for name, both in differing.items() if len(both) > 1]
    return f"{one.row.method} mixes {', '.join(told)} over its seeds" if told else ""


def _as_json(one: Summary) -> dict[str, Any]:
    row, published = one.row, one.row.published()
    directions = {}
    for index, name in enumerate(_NAMES):
        directions[name] = {
            "rank1": [found.rank1[name] for found in one.results.values()],
            "mAP": [found.mAP[name] for found in one.results.values()],
            "rank1_published": None if published is None else published[index],
        }
    return {
        "dataset": row.dataset,
        "desensitizer": row.desensitizer,
        "radius": row.radius,
        "method": row.method,
        "seeds": list(one.results),
        "retrieval": directions,
        "tolerance_points": TOLERANCE.get(row.dataset) if published is not None else None,
        "agrees": one.agrees if published is not None else None,
        "folders": {seed: str(row.experiments[seed].test_folder) for seed in one.results},
    }
