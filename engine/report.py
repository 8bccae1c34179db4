"""The report of an evaluation: its tables and log lines, and ``results.json``, written and read."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.scoring.image_quality import ImageQuality
from engine.scoring.retrieval import RetrievalScores
from engine.supervision import Validation
from utils.errors import UserError
from utils.files import write_text

RESULTS_NAME = "results.json"

# (query, gallery), in the order of the published "a/b/c/d" cells.
DIRECTIONS = (
    ("raw", "raw"),
    ("raw", "protected"),
    ("protected", "raw"),
    ("protected", "protected"),
)

# Order in which the kinds of image are printed.
IMAGE_KINDS = ("desensitized", "anonymized", "encrypted", "decrypted", "recovered")

_METRIC_DEFINITION = (
    "cosine distance on the feature after the BNNeck; gallery images of the query's identity and "
    "camera are ignored, unless the notes name other matches; mAP is the mean over queries of "
    "plain average precision"
)


@dataclass(frozen=True)
class RetrievalRow:
    """Scores of one direction under one key state; rates in [0, 1]."""

    query: str
    gallery: str
    key: str
    rank1: float
    rank5: float
    rank10: float
    mAP: float  # noqa: N815 - the name in the published tables and in results.json
    mINP: float  # noqa: N815
    num_queries: int
    num_gallery: int
    num_skipped: int = 0
    degenerate: bool = False
    refused: bool = False  # a wrong key opened no image; scores of the ciphertext

    @classmethod
    def of(
        cls, direction: tuple[str, str], key: str, scores: RetrievalScores, *, refused: bool = False
    ) -> RetrievalRow:
        """Return the row of one scored direction."""
        own = ("query", "gallery", "key", "refused")
        names = (field.name for field in fields(cls) if field.name not in own)
        values = {name: getattr(scores, name) for name in names}
        return cls(*direction, key, refused=refused, **values)

    @property
    def name(self) -> str:
        """The direction, such as ``raw->protected``."""
        return f"{self.query}->{self.gallery}"


@dataclass(frozen=True)
class EvalReport:
    """All scores of one evaluation; training, upgradation and evaluate-only use the same report."""

    dataset: str  # data set that was scored
    split: str  # ``test`` or ``val``
    mode: str  # ``GCR`` or ``C``
    epoch: int  # epoch of the weights
    headline_key: str  # key state of the published row
    retrieval: tuple[RetrievalRow, ...]  # a row for each direction and key state
    image_quality: dict[str, ImageQuality]  # quality against raw, by kind of image
    # the same rows after k-reciprocal re-ranking; empty if it was not asked for
    reranked: tuple[RetrievalRow, ...] = ()
    # facts that a reader needs in addition to the numbers
    notes: dict[str, str] = field(default_factory=dict)
    caution: str = ""  # a line below the retrieval scores of encrypted images, or ''
    # versions of the software, and the machine
    versions: dict[str, str] = field(default_factory=dict)

    def row(self, query: str, gallery: str, key: str = "none") -> RetrievalRow:
        """Return one row; raw->raw does not depend on keys, so its key state is always ``none``.

        Raises:
            KeyError: The direction was not scored under that key state.
        """
        wanted = (query, gallery, "none" if (query, gallery) == ("raw", "raw") else key)
        return {(row.query, row.gallery, row.key): row for row in self.retrieval}[wanted]

    @property
    def rank1(self) -> float:
        """Rank-1 of raw queries in a protected gallery, on which upgradation depends."""
        return self.row("raw", "protected").rank1

    @property
    def validation(self) -> Validation:
        """The scores that supervision upgradation depends on; for the joint model only."""
        quality = self.image_quality
        return Validation(
            self.rank1,
            quality["anonymized"].psnr_db,
            quality["desensitized"].psnr_db,
            quality["anonymized"].ssim,
            quality["desensitized"].ssim,
            self.row("raw", "raw").rank1,
        )

    def published_row(self) -> str:
        """Return the four rank-1 percentages in the form of the published tables, a/b/c/d."""
        rows = (self.row(*direction, self.headline_key) for direction in DIRECTIONS)
        return "/".join(f"{100 * row.rank1:.1f}" for row in rows)

    def scalars(self) -> dict[str, float]:
        """Return slash-named numbers for TensorBoard and ``metrics.jsonl``."""
        numbers: dict[str, float] = {}
        for row in self.retrieval:
            prefix = f"eval/{row.name}" if row.key == "none" else f"eval/{row.name}/{row.key}"
            for metric in ("rank1", "rank5", "rank10", "mAP", "mINP"):
                numbers[f"{prefix}/{metric}"] = getattr(row, metric)
        for kind, quality in self.image_quality.items():
            numbers[f"privacy/{kind}/psnr"] = quality.psnr_db
            numbers[f"privacy/{kind}/ssim"] = quality.ssim
        return numbers

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``results.json``."""
        content: dict[str, Any] = {
            "schema": 1,
            "dataset": self.dataset,
            "split": self.split,
            "mode": self.mode,
            "epoch": self.epoch,
            "retrieval": [_row_json(row) for row in self.retrieval],
            "image_quality": {
                kind: {"psnr_db": _finite(quality.psnr_db), "ssim": _finite(quality.ssim)}
                for kind, quality in self.image_quality.items()
            },
            "headline_key": self.headline_key,
            "published_row": self.published_row(),
            "metric_definition": _METRIC_DEFINITION,
            "notes": self.notes,
            "versions": self.versions,
        }
        if self.reranked:
            content["retrieval_reranked"] = [_row_json(row) for row in self.reranked]
        return content

    def save(self, path: Path) -> None:
        """Write ``results.json`` atomically."""
        write_text(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    def table(self) -> str:
        """Return the tables for a terminal."""
        lines = [
            f"{self.dataset}, {self.split} split, mode {self.mode}, epoch {self.epoch}"
            + "".join(f"; {key}: {value}" for key, value in self.notes.items()),
            *_retrieval_lines("retrieval", self.retrieval),
        ]
        if self.reranked:
            lines += _retrieval_lines("re-ranked", self.reranked)
        lines += [
            *([self.caution] if self.caution else []),
            "",
            f"{'image quality against raw':<30}{'PSNR dB':>9}{'SSIM':>9}",
            *(
                f"  {kind:<28}{quality.psnr_db:>9.2f}{quality.ssim:>9.3f}"
                for kind in IMAGE_KINDS
                if (quality := self.image_quality.get(kind))
            ),
            "",
            "rank-1, raw->raw / raw->protected / protected->raw / protected->protected: "
            + self.published_row(),
        ]
        return "\n".join(lines)

    def log_lines(self) -> list[str]:
        """Return the log lines that scripts parse: raw->protected, under the headline's key."""
        row = self.row("raw", "protected", self.headline_key)
        return [
            f"Validation Results - Epoch: {self.epoch}",
            f"mINP: {row.mINP:.1%}",
            f"mAP: {row.mAP:.1%}",
            f"CMC curve, Rank-1  :{row.rank1:.1%}",
            f"CMC curve, Rank-5  :{row.rank5:.1%}",
            f"CMC curve, Rank-10 :{row.rank10:.1%}",
        ]


def _finite(value: float) -> float | None:
    """Return a finite number, else None: equal images have an infinite PSNR, which JSON lacks."""
    return value if math.isfinite(value) else None


def _row_json(row: RetrievalRow) -> dict[str, Any]:
    content = asdict(row)
    # Flags are left out unless they are set, so that the published schema does not change.
    for flag in ("num_skipped", "degenerate", "refused"):
        if not content[flag]:
            del content[flag]
    return content


def _retrieval_lines(title: str, rows: Iterable[RetrievalRow]) -> list[str]:
    head = f"{title + ', query -> gallery':<36}{'key':<11}"
    lines = ["", head + "".join(f"{name:>8}" for name in ("rank-1", "-5", "-10", "mAP", "mINP"))]
    for row in rows:
        rates = (row.rank1, row.rank5, row.rank10, row.mAP, row.mINP)
        text = f"  {row.query + ' -> ' + row.gallery:<34}{row.key:<11}"
        text += "".join(f"{100 * rate:>7.1f}%" for rate in rates)
        if row.refused:
            text += "  refused; scored as an observer sees it"
        if row.degenerate:
            text += "  DEGENERATE FEATURES: the scores mean nothing"
        if row.num_skipped:
            text += f"  ({row.num_skipped} queries without a match left out)"
        lines.append(text)
    return lines


@dataclass(frozen=True)
class Results:
    """The numbers of one ``results.json``."""

    rank1: Mapping[str, float]  # by direction, in [0, 1], for the headline's key
    mAP: Mapping[str, float]  # noqa: N815 - the same; the name in results.json
    psnr_db: Mapping[str, float]  # quality against raw, by kind of image
    ssim: Mapping[str, float]
    versions: Mapping[str, str]  # versions of the software, and the machine

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read ``results.json`` in the output folder of an evaluation.

        Raises:
            UserError: The file does not exist or is damaged.
        """
        path = folder / RESULTS_NAME
        try:
            content = json.loads(path.read_text("utf-8"))
            rows = {"->".join(way): headline_row(content, *way) for way in DIRECTIONS}
            quality = content["image_quality"]
            return cls(
                {name: float(row["rank1"]) for name, row in rows.items()},
                {name: float(row["mAP"]) for name, row in rows.items()},
                # null means the infinite PSNR of equal images
                {
                    kind: math.inf if scores["psnr_db"] is None else float(scores["psnr_db"])
                    for kind, scores in quality.items()
                },
                {kind: float(scores["ssim"]) for kind, scores in quality.items()},
                content["versions"],
            )
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; evaluate first") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not the report of an evaluation ({error!r}); delete it, then evaluate"
            ) from None


def headline_row(content: Mapping[str, Any], query: str, gallery: str) -> Mapping[str, Any]:
    """Return the row of a direction in ``results.json``, under the key state of the headline.

    For raw->raw and in mode C, the only key state is ``none``.

    Raises:
        KeyError: The direction was not scored.
    """
    rows = {
        r["key"]: r for r in content["retrieval"] if (r["query"], r["gallery"]) == (query, gallery)
    }
    row: Mapping[str, Any] = rows.get(content["headline_key"]) or rows["none"]
    return row


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of one number over several seeds."""

    mean: float  # the mean
    # the sample standard deviation; None for a single value or infinite values
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return mean and deviation of at least one value."""
        has_one = len(values) > 1 and all(map(math.isfinite, values))
        deviation = statistics.stdev(values) if has_one else None
        return cls(statistics.fmean(values), deviation)

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Return ``87.1 ± 0.4``, or ``87.1`` without a deviation."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {scale * self.deviation:.{digits}f}"
