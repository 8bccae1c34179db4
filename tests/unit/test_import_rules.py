"""Which folder may import which: the house's one-way streets."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.paths import ROOT

FOLDERS = frozenset(
    ("configs", "data", "engine", "layers", "modeling", "solver", "tools", "utils", "tests")
)
# Who may import whom, besides itself. `configs` is for tools and tests; build functions get a tree.
ALLOWED = {
    "utils": set(),
    "layers": {"utils"},
    "data": {"utils", "layers"},
    "modeling": {"utils", "layers"},
    "solver": {"utils"},
    "engine": {"data", "modeling", "solver", "layers", "utils"},
    "configs": {"utils"},
    "tools": FOLDERS - {"tests"},
}
# Scripts that live outside tools but are run, not imported.
SCRIPTS = {"data/train_split.py"}


def sources() -> list[Path]:
    return sorted(p for folder in ALLOWED for p in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST, own: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of all imports, also in functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(own.parent.parts[: len(own.parent.parts) - node.level + 1])
            prefix = f"{base}." if node.level and node.module else base if node.level else ""
            module = f"{prefix}{node.module or ''}"
            yield node.lineno, module
            # `from modeling import encryption` names a module as well
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folder_imports_only_what_it_may(folder: str) -> None:
    broken = []
    for path in (p for p in sources() if p.relative_to(ROOT).parts[0] == folder):
        own = path.relative_to(ROOT)
        allowed = ALLOWED["tools"] if str(own) in SCRIPTS else ALLOWED[folder] | {folder}
        for line, module in imported(ast.parse(path.read_text("utf-8")), own):
            top = module.split(".")[0]
            if top in FOLDERS and top not in allowed:
                broken.append(f"{own}:{line} imports {module}")
    assert not broken, "\n".join(broken)


def test_scoring_stands_alone() -> None:
    """Scores can be had of any features, without networks, trainers or evaluations."""
    modules = {
        module
        for path in (ROOT / "engine" / "scoring").rglob("*.py")
        for _, module in imported(ast.parse(path.read_text("utf-8")), path.relative_to(ROOT))
        if module.startswith("engine.")
    }
    assert modules and all(module.startswith("engine.scoring") for module in modules)


def test_rule_sees_every_way_to_import() -> None:
    text = "import engine.trainer\ndef f():\n    from data import records\nfrom .. import layers\n"
    names = {module for _, module in imported(ast.parse(text), Path("modeling/sub/x.py"))}
    assert {"engine.trainer", "data", "data.records", "modeling.layers"} <= names


def test_every_third_party_import_is_a_requirement_and_the_reverse() -> None:
    """No package that is not used, and none that is used in silence."""
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    used, optional = set(), set()
    for path in sources():
        own, tree = path.relative_to(ROOT), ast.parse(path.read_text("utf-8"))
        used |= {module.split(".")[0] for _, module in imported(tree, own)}
        optional |= imported_if_there(tree)
    used = {names.get(name, name) for name in used - FOLDERS - set(sys.stdlib_module_names)}
    # torch.utils.tensorboard imports tensorboard; nobody else does
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    required = {line.split(">=")[0] for line in lines if line and not line.startswith("#")}
    assert used == required - {"tensorboard"}
    # the others are asked for where they are needed, and each extra says which they are
    extras = {name for packages in _extras().values() for name, _ in packages}
    assert optional == extras
    assert not extras & required


def imported_if_there(tree: ast.AST) -> set[str]:
    """Packages of the extras: what the two functions that import by name are given."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            name = node.args[0]
            if node.func.id in ("require", "optional_package") and isinstance(name, ast.Constant):
                found.add(str(name.value).split(".")[0])
    return found


def _extras() -> dict[str, list[tuple[str, str]]]:
    """Of setup.py: for each extra its packages and their lower bounds."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    (value,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "extras_require"
    )
    return {
        extra: [(name, bound) for name, _, bound in (one.partition(">=") for one in packages)]
        for extra, packages in ast.literal_eval(value).items()
    }


def test_every_extra_has_lower_bounds_and_is_tested() -> None:
    assert all(bound for packages in _extras().values() for _, bound in packages)
    development = (ROOT / "requirements-dev.txt").read_text("utf-8")
    assert f"-e .[{','.join(_extras())}]\n" in development


def test_files_and_functions_stay_readable() -> None:
    long_files, long_functions = [], []
    for path in sources():
        text = path.read_text("utf-8")
        own = path.relative_to(ROOT)
        if text.count("\n") > 500:
            long_files.append(f"{own}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 80:
                    long_functions.append(f"{own}:{node.lineno} {node.name}: {length} lines")
    assert not long_files + long_functions, "\n".join(long_files + long_functions)
