"""constraints.txt pins every requirement, with hashes, for each supported Python."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.fixtures.paths import ROOT

# Versions with known attacks: torch 2.10 for CVE-2025-32434 and CVE-2026-24747 (weights_only=True
# could be bypassed).
SAFE = {"torch": "2.10", "pillow": "12.3", "cryptography": "44.0.1", "tqdm": "4.66.3"}
MACHINE = {
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


# Experiment trackers, which `make constraints` leaves out.
NOT_PINNED = {"wandb", "mlflow-skinny", "sqlalchemy", "alembic"}


def lower_bounds() -> dict[str, Version]:
    text = (ROOT / "requirements.txt").read_text("utf-8")
    text += (ROOT / "setup.py").read_text("utf-8")
    return {name: Version(bound) for name, bound in re.findall(r"([a-z0-9-]+)>=([0-9.]+)", text)
            if name not in {"python", *NOT_PINNED}}  # fmt: skip


def pinned(python: str) -> dict[str, Version]:
    """Return the version of each package that constraints.txt chooses for a Python."""
    versions: dict[str, Version] = {}
    text = (ROOT / "constraints.txt").read_text("utf-8").replace("\\\n", "")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line.split("--hash")[0].strip())
        environment = MACHINE | {"python_full_version": f"{python}.1", "python_version": python}
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        assert "--hash=sha256:" in line, line
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        name = canonicalize_name(requirement.name)
        assert name not in versions, f"{name} is pinned twice for Python {python}"
        versions[name] = Version(specifier.version)
    return versions


def test_lower_bounds_exclude_versions_with_known_attacks() -> None:
    bounds = lower_bounds()
    for name, version in SAFE.items():
        assert bounds[name] >= Version(version), name


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_requirement_is_pinned_above_its_lower_bound(python: str) -> None:
    """If not: make constraints."""
    versions = pinned(python)
    for name, bound in lower_bounds().items():
        assert versions[name] >= bound, name
