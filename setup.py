"""Installation: ``pip install -e .`` in a checkout."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
# Lower bounds of packages are in this file only.
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()


class NoWheel(bdist_wheel):
    """Refuse to build a wheel: its top-level packages would be called data, utils and so on."""

    def run(self) -> None:
        """Explain how to install instead; ``pip install -e .`` does not come here."""
        raise SystemExit(
            "error: SecureReID is installed from a checkout: run `pip install -e .` there. A wheel "
            "would install packages named data, utils and tools, which other projects also use."
        )


setup(
    name="secure-reid",
    version="0.1.0",
    description="Privacy-preserving person re-identification: anonymize, recognise, recover",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="SecureReID contributors",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(exclude=["tests", "tests.*"]),
    package_data={"configs": ["*.yml"], "securereid": ["py.typed"], "tools.lib": ["*.jinja"]},
    entry_points={"console_scripts": ["securereid = securereid.cli:main"]},
    cmdclass={"bdist_wheel": NoWheel},
    install_requires=[line for line in REQUIREMENTS if line.strip() and not line.startswith("#")],
    extras_require={
        # The CUHK03 release is MATLAB v7.3.
        "cuhk03": ["h5py>=3.10"],
        # MODEL.NAME timm:<name>; from 1.0.29 on ViTs with other image sizes can be exported.
        "timm": ["timm>=1.0.29"],
        # tools/export.py writes ONNX files, and runs them to compare.
        "onnx": ["onnx>=1.16", "onnxruntime>=1.17"],
        # LPIPS in the model attacks; AlexNet's weights must be in torch's cache.
        "lpips": ["torchmetrics>=1.9"],
        # The options of `securereid` in the shell.
        "completion": ["argcomplete>=3.1"],
        # RUNTIME.TRACKERS. MLflow's local store is a database.
        "wandb": ["wandb>=0.22.3"],
        "mlflow": ["mlflow-skinny>=3.1", "sqlalchemy>=2.0", "alembic>=1.13"],
    },
)
