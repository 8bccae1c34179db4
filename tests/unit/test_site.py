"""The documentation site builds without warnings and contains every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT

build = pytest.importorskip("sphinx.cmd.build")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")


def test_the_site_builds_without_warnings_and_refers_to_no_server(tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert build.main(["-q", "-W", "-b", "html", str(ROOT / "docs"), str(site)]) == 0
    for page in (ROOT / "docs").glob("*.md"):
        text = (site / f"{page.stem}.html").read_text("utf-8")
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?://", text)


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^(\w+)$", (ROOT / "docs" / "index.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(
        page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index"
    )
