"""The documentation site builds without warnings and contains every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT

build = pytest.importorskip("sphinx.cmd.build")
pytest.importorskip("myst_nb")
pytest.importorskip("furo")


def test_the_site_builds_without_warnings_and_refers_to_no_server(tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert build.main(["-q", "-W", "-b", "html", str(ROOT / "docs"), str(site)]) == 0
    for name in _pages():
        text = (site / f"{name}.html").read_text("utf-8")
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?://", text)


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r" <(\w+)>$", (ROOT / "docs" / "index.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(_pages() - {"index"})


def _pages() -> set[str]:
    return {path.stem for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".ipynb")}
