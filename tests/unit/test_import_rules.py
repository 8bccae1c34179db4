"""Rules about the source files: which package imports which, requirements, lengths."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT
from tests.fixtures.sources import PACKAGES, nodes, parsed, sources
from utils.metric_writer import TRACKERS

FOLDERS = {*PACKAGES, "tests"}
# Package -> other packages that it may import. Only tools and tests import `configs`; build
# functions receive the configuration as an argument.
ALLOWED = {
    "utils": set(),
    "layers": {"utils"},
    "data": {"utils", "layers"},
    "modeling": {"utils", "layers"},
    "solver": {"utils"},
    "engine": {"data", "modeling", "solver", "layers", "utils"},
    "configs": {"utils"},
    "tools": FOLDERS - {"tests", "securereid"},
    "securereid": FOLDERS - {"tests"},
}
# Scripts outside tools: they are run, not imported.
SCRIPTS = {"data/train_split.py"}


def imported(nodes: Iterable[ast.AST], own: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of all imports, also in functions."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(own.parent.parts[: len(own.parent.parts) - node.level + 1])
            prefix = f"{base}." if node.level and node.module else base if node.level else ""
            module = f"{prefix}{node.module or ''}"
            yield node.lineno, module
            # `from modeling import encryption` imports a module too
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_only_what_it_may(folder: str) -> None:
    broken = []
    for path in sources(folder):
        own = path.relative_to(ROOT)
        allowed = ALLOWED["tools"] if str(own) in SCRIPTS else ALLOWED[folder] | {folder}
        for line, module in imported(nodes(path), own):
            top = module.split(".")[0]
            if top in FOLDERS and top not in allowed:
                broken.append(f"{own}:{line} imports {module}")
    assert not broken, "\n".join(broken)


def test_scoring_imports_no_other_engine_module() -> None:
    """Features from any source can be scored without networks, trainers or evaluations."""
    modules = {
        module
        for path in sources("engine/scoring")
        for _, module in imported(nodes(path), path.relative_to(ROOT))
        if module.startswith("engine.")
    }
    assert modules and all(module.startswith("engine.scoring") for module in modules)


def test_every_form_of_import_is_seen() -> None:
    text = "import engine.trainer\ndef f():\n    from data import records\nfrom .. import layers\n"
    names = {module for _, module in imported(ast.walk(ast.parse(text)), Path("modeling/sub/x.py"))}
    assert {"engine.trainer", "data", "data.records", "modeling.layers"} <= names


def test_third_party_imports_equal_the_requirements() -> None:
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    used, optional = set(), set()
    for path in sources():
        own = path.relative_to(ROOT)
        used |= {module.split(".")[0] for _, module in imported(nodes(path), own)}
        optional |= optional_imports(path)
    used = {names.get(name, name) for name in used - FOLDERS - set(sys.stdlib_module_names)}
    # tensorboard is imported by torch.utils.tensorboard only
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    required = {line.split(">=")[0] for line in lines if line and not line.startswith("#")}
    assert used == required - {"tensorboard"}
    # optional packages are imported by name, where they are needed
    extras = {name for packages in _extras().values() for name, _ in packages}
    # MLflow without its server, and what its database needs
    assert optional - {"mlflow"} == extras - {"mlflow-skinny", "sqlalchemy", "alembic"}
    assert not extras & required


IMPORTING = ("import_module", "optional_package", "package")


def optional_imports(path: Path) -> set[str]:
    """Return the packages that a module passes to the functions that import by name."""
    packages = set()
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            name = node.args[0]
            if node.func.id in IMPORTING and isinstance(name, ast.Constant):
                packages.add(str(name.value).split(".")[0])
    return packages


def _extras() -> dict[str, list[tuple[str, str]]]:
    """Return the packages and lower bounds of each extra in setup.py."""
    (value,) = (
        node.value
        for node in nodes(ROOT / "setup.py")
        if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    return {
        extra: [(name, bound) for name, _, bound in (entry.partition(">=") for entry in packages)]
        for extra, packages in ast.literal_eval(value).items()
    }


def test_every_extra_has_lower_bounds_and_is_installed_for_tests() -> None:
    assert all(bound for packages in _extras().values() for _, bound in packages)
    development = (ROOT / "requirements-dev.txt").read_text("utf-8")
    # The tests of the trackers' real packages are slow, and skipped without them.
    extras = ",".join(extra for extra in _extras() if extra not in TRACKERS)
    assert f"-e .[{extras}]\n" in development


def test_files_and_functions_stay_readable() -> None:
    long_files, long_functions = [], []
    for path in sources():
        text = path.read_text("utf-8")
        own = path.relative_to(ROOT)
        if text.count("\n") > 500:
            long_files.append(f"{own}: {text.count(chr(10))} lines")
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 80:
                    long_functions.append(f"{own}:{node.lineno} {node.name}: {length} lines")
    assert not long_files + long_functions, "\n".join(long_files + long_functions)


# securereid lists its names in __all__; the modules of tools are the commands that README lists.
DESCRIBED = sorted(
    path.parent
    for folder in ALLOWED.keys() - {"securereid", "tools"}
    for path in (ROOT / folder).rglob("__init__.py")
)


@pytest.mark.parametrize("package", DESCRIBED, ids=lambda path: str(path.relative_to(ROOT)))
def test_package_docstrings_list_modules_and_public_names(package: Path) -> None:
    """Each module of the package is named; each other name is defined in one of them."""
    names = set(re.findall(r"`(\w+)`", ast.get_docstring(parsed(package / "__init__.py")) or ""))
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert modules <= names
    folders = {path.name for path in package.iterdir() if path.is_dir()} | FOLDERS
    defined = {name for module in modules for name in definitions(package / f"{module}.py")}
    assert not names - modules - folders - defined


def definitions(path: Path) -> set[str]:
    """Return the functions, classes and constants that a module defines."""
    names = set()
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
