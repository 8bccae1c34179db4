"""Paths of a keyring and of its master key."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.vault.master import KeyFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def master(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "master.key")
