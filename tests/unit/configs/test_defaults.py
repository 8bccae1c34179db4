from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.defaults import KEY_BY_NAME, KEYS, SECTIONS, default_config
from configs.loading import dump, load
from configs.reference import markdown
from configs.schema import Number
from configs.validation import cross_field_problems
from modeling.objectives import GENERATOR_TERMS, PAIR_TERMS, REID_TERMS
from tests.fixtures.paths import ROOT
from tests.fixtures.sources import nodes, sources
from utils.config_tree import get_value

CODE = ("data", "engine", "layers", "modeling", "solver", "tools", "utils")


def chain(node: ast.AST) -> list[str]:
    """Return the names of ``a.b.c``; [] for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def keys_read(path: Path) -> Iterator[str]:
    """Yield the configuration keys a file reads, directly or after ``solver = cfg.SOLVER``."""
    alias: dict[str, str] = {}
    for node in nodes(path):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names = chain(node.value)
            if names and names[-1] in SECTIONS:
                alias[node.targets[0].id] = names[-1]
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names = chain(node)
            for start in range(1, len(names)):
                yield ".".join(names[start:])
            if names and names[0] in alias:
                yield ".".join([alias[names[0]], *names[1:]])


# build_objectives reads the weights that these tables name.
TERMS = (*GENERATOR_TERMS.values(), *REID_TERMS.values(), *PAIR_TERMS.values())
WEIGHTS = {key for _, keys in TERMS for key in keys}


def test_every_key_is_read_somewhere() -> None:
    read = {key for path in sources(*CODE) for key in keys_read(path)}
    read |= WEIGHTS
    unread = sorted(set(KEY_BY_NAME) - read)
    assert not unread, f"keys that nothing reads: {', '.join(unread)}"


def test_every_key_that_is_read_exists() -> None:
    """A misspelt key in a rarely used branch is found here, not by a user."""
    unknown = sorted(WEIGHTS - set(KEY_BY_NAME))
    for path in sources(*CODE):
        for node in nodes(path):
            names = chain(node) if isinstance(node, ast.Attribute) else []
            if len(names) > 2 and names[0] == "cfg" and names[1] in SECTIONS:
                key = ".".join(names[1:3])
                if key not in KEY_BY_NAME and names[2].isupper():
                    unknown.append(f"{path.relative_to(ROOT)}:{node.lineno} {key}")
    assert not unknown, "\n".join(unknown)


def test_defaults_are_valid() -> None:
    cfg = default_config()
    assert cross_field_problems(cfg) == []
    for key in KEYS:
        value = key.convert(get_value(cfg, key.name))
        assert value == key.default
        assert type(value) is type(key.default)


def test_every_key_has_a_meaning_and_is_listed_once() -> None:
    assert len(KEY_BY_NAME) == len(KEYS)
    for key in KEYS:
        assert len(key.meaning) > 8, key.name
        assert key.allowed.expected, key.name
        assert key.name == key.name.upper()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yml")), ids=lambda p: p.name)
def test_every_config_file_can_be_loaded_dumped_and_loaded_again(
    path: Path, tmp_path: Path
) -> None:
    cfg = load(path)
    dump(cfg, tmp_path / "effective.yml")
    assert load(tmp_path / "effective.yml") == cfg


def test_the_baseline_file_contains_the_published_numbers() -> None:
    cfg = load(ROOT / "configs/AGW_baseline.yml")
    default = load()
    cfg.defrost()
    cfg.OUTPUT_DIR = default.OUTPUT_DIR
    assert cfg == default


def test_every_number_has_an_upper_bound() -> None:
    for key in KEYS:
        allowed = getattr(key.allowed, "item", key.allowed)
        if isinstance(allowed, Number):
            assert allowed.high < math.inf, key.name


def test_the_page_of_all_keys_is_up_to_date() -> None:
    """If not: python3 -m configs.reference > docs/configuration.md."""
    assert (ROOT / "docs/configuration.md").read_text("utf-8") == markdown()
