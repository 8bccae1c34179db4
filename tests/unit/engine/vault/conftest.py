"""Keyrings, with and without an audit log, and a small archive."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile
from tests.fixtures.archives import SmallArchive, make_archive
from tests.fixtures.keyrings import LoggedKeyring


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def master(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "master.key")


@pytest.fixture
def keyring(path: Path, master: KeyFile) -> Keyring:
    return Keyring.create(path, master)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> SmallArchive:
    return make_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture
def archive(template: SmallArchive, tmp_path: Path) -> SmallArchive:
    return template.copy(tmp_path / "archive")


@pytest.fixture
def set_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that moves the clock a number of days into the future."""

    def move(days: int) -> None:
        day = int(time.time() // 86_400) + days
        for module in ("keyring", "keyring_store", "erasure"):
            monkeypatch.setattr(f"engine.vault.{module}.today", lambda: day)

    return move


@pytest.fixture
def logged(tmp_path: Path) -> LoggedKeyring:
    return LoggedKeyring(tmp_path)


@pytest.fixture
def filled(logged: LoggedKeyring) -> LoggedKeyring:
    """Return a keyring whose log has six entries."""
    logged.run("one", "two", "three")
    return logged
