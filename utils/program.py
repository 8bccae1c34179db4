"""Imported first by files that are run: what has to be in place before any package is imported."""

from __future__ import annotations

import os
import sys

from utils.contention import limit_spinning
from utils.errors import name_missing_package

sys.excepthook = name_missing_package
limit_spinning(os.environ)
