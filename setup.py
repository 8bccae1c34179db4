"""Installation: ``pip install -e .`` in a checkout."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
FOLDERS = ("configs", "data", "engine", "layers", "modeling", "solver", "tools", "utils")


def requirements() -> list[str]:
    """Return the packages of ``requirements.txt``: the one place their lower bounds stand."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


setup(
    name="secure-reid",
    version="0.1.0",
    description="Privacy-preserving person re-identification: anonymize, recognise, recover",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8")
    if (ROOT / "README.md").is_file()
    else "",
    long_description_content_type="text/markdown",
    author="SecureReID contributors",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=[p for name in FOLDERS for p in (name, f"{name}.*")]),
    package_data={"configs": ["*.yml"], "tools.lib": ["*.jinja"]},
    install_requires=requirements(),
    extras_require={
        # The CUHK03 release is MATLAB v7.3 (h5py) and its protocol files are MATLAB 5 (scipy).
        "cuhk03": ["h5py>=3.10", "scipy>=1.10.1"],
        # tools/export.py writes ONNX files, and runs them to compare.
        "onnx": ["onnx>=1.16", "onnxruntime>=1.17"],
    },
)
