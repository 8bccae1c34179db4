"""Settings of the documentation site: ``make docs`` builds it from the pages in this folder."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "SecureReID"
author = "SecureReID contributors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "SecureReID"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
highlight_language = "none"  # of blocks without a language, which are command lines
exclude_patterns = ["_build"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the outputs of the notebook are committed; the tests run its cells
myst_enable_extensions = ["colon_fence"]
# Links to files of the repository, which are not pages of the site, are checked by the tests.
suppress_warnings = ["myst.xref_missing"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
