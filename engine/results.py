"""Results of finished evaluations, read back: numbers of one, mean and spread of several."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.report import DIRECTIONS
from utils.errors import UserError

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Results:
    """Numbers of one evaluation.

    Attributes:
        rank1, mAP: By direction, ``raw->protected``; in [0, 1], under the headline's key.
        psnr_db, ssim: Against raw, by kind of image.
        versions: Software and machine.
    """

    rank1: Mapping[str, float]
    mAP: Mapping[str, float]  # noqa: N815 - the name in results.json
    psnr_db: Mapping[str, float]
    ssim: Mapping[str, float]
    versions: Mapping[str, str]

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read ``results.json`` in the OUTPUT_DIR of an evaluation.

        Raises:
            UserError: There is none, or it is damaged.
        """
        path = folder / RESULTS_NAME
        try:
            content = json.loads(path.read_text("utf-8"))
            rows = {"->".join(way): _headline(content, *way) for way in DIRECTIONS}
            quality = content["image_quality"]
            return cls(
                {name: float(row["rank1"]) for name, row in rows.items()},
                {name: float(row["mAP"]) for name, row in rows.items()},
                {kind: _psnr_db(one) for kind, one in quality.items()},
                {kind: float(q["ssim"]) for kind, q in quality.items()},
                content["versions"],
            )
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; evaluate first") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no result of an evaluation ({error!r}); delete it and evaluate again"
            ) from None


def _psnr_db(quality: Mapping[str, Any]) -> float:
    """Return a PSNR; null stands for the infinite one of equal images."""
    return math.inf if quality["psnr_db"] is None else float(quality["psnr_db"])


def _headline(content: Mapping[str, Any], query: str, gallery: str) -> Mapping[str, Any]:
    """Return the row of a direction; what involves nothing encrypted has the key ``none`` only."""
    rows = {
        r["key"]: r for r in content["retrieval"] if (r["query"], r["gallery"]) == (query, gallery)
    }
    row: Mapping[str, Any] = rows.get(content["headline_key"]) or rows["none"]
    return row


@dataclass(frozen=True)
class Spread:
    """One number over several seeds.

    Attributes:
        mean: Their mean.
        deviation: Their sample standard deviation; None of a single one, or of infinite ones.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        has_one = len(values) > 1 and all(map(math.isfinite, values))
        deviation = statistics.stdev(values) if has_one else None
        return cls(statistics.fmean(values), deviation)

    def text(self, digits: int = 1, scale: float = 1.0) -> str:
        """Return ``87.1 ± 0.4``, or the value alone where there is one."""
        mean = f"{scale * self.mean:.{digits}f}"
        return mean if self.deviation is None else f"{mean} ± {scale * self.deviation:.{digits}f}"
