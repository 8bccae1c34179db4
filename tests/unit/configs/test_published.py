from __future__ import annotations

import itertools
import re

from configs.published import RANK1, STRENGTHS, TOLERANCE, published_rank1
from tests.fixtures.paths import GOLDEN

TABLE = GOLDEN / "published_rank1.md"
NAMES = {"Market-1501": "market1501", "MSMT17": "msmt17", "CUHK03": "cuhk03"}


def test_every_cell_has_four_rates() -> None:
    assert set(RANK1) == set(itertools.product(TOLERANCE, ("base", "without", "full")))
    for (dataset, method), cells in RANK1.items():
        for desensitizer, _ in zip(STRENGTHS, cells, strict=True):
            rates = published_rank1(dataset, method, desensitizer)
            assert rates is not None and len(rates) == 4
            assert all(0 < rate < 1 for rate in rates)
    assert published_rank1("synthetic", "full", "mosaic") is None
    assert published_rank1("market1501", "full", "fog") is None


def test_the_table_is_the_published_one() -> None:
    assert tuple(STRENGTHS) == ("blur", "mosaic", "noise")  # the columns
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    dataset = ""
    for line in TABLE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and all(re.fullmatch(r"[\d.]+(/[\d.]+){3}", cell) for cell in cells[2:]):
            dataset = NAMES.get(cells[0], dataset)
            found[dataset, cells[1].split()[0]] = tuple(cells[2:])
    assert found == RANK1
