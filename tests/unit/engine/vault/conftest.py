"""A keyring, its path and its master key."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def master(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "master.key")


@pytest.fixture
def keyring(path: Path, master: KeyFile) -> Keyring:
    return Keyring.create(path, master)
