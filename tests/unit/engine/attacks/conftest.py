"""Secure ciphers draw from the operating system; a verdict on them must not be a matter of luck."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(autouse=True)
def _repeatable_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", random.Random(1).randbytes)
