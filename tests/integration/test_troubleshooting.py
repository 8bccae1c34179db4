"""docs/TROUBLESHOOTING.md has an entry for every error message of the code.

Each line of a ``text`` block of the page is a pattern: part of a message, with ``...`` for values.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.fixtures.paths import ROOT
from tests.fixtures.sources import nodes, sources

PAGE = ROOT / "docs" / "TROUBLESHOOTING.md"
_ARGUMENT_ERRORS = {"ArgumentTypeError", "error"}  # of argparse
_VALUE = "..."


@cache
def _error_classes() -> frozenset[str]:
    """Return the names of ``UserError`` and of all classes that are derived from it."""
    classes = [
        (node.name, {_name(base) for base in node.bases})
        for path in sources()
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
    ]
    names, size = {"UserError"}, 0
    while len(names) > size:
        size = len(names)
        names |= {name for name, bases in classes if bases & names}
    return frozenset(names)


def _name(node: ast.expr) -> str:
    """Return the last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _text(node: ast.AST) -> str:
    """Return a string of the code with ``...`` for each value; empty for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or _VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{_text(node.left) or _VALUE}{_text(node.right) or _VALUE}"
    return ""


def _is_message(text: str) -> bool:
    """Return whether a text has at least three words of its own, so it is not only a code."""
    return " " in text and len(re.findall(r"[A-Za-z]+", text.replace(_VALUE, " "))) >= 3


def _arguments(path: Path, node: ast.AST) -> list[ast.expr]:
    """Return the expressions of a node that may contain the text of an error."""
    if isinstance(node, ast.Call):
        return node.args if _name(node.func) in _error_classes() | _ARGUMENT_ERRORS else []
    # Rules between configuration keys yield their messages.
    is_rule = path.match("configs/validation.py") and isinstance(node, ast.Yield)
    return [node.value] if is_rule and node.value is not None else []


@cache
def _messages() -> list[tuple[str, str]]:
    """Return each message with ``file:line`` of its first line in the code."""
    return list(_yield_messages())


def _yield_messages() -> Iterator[tuple[str, str]]:
    for path in sources():
        for node in nodes(path):
            for argument in _arguments(path, node):
                listed = argument.elts if isinstance(argument, ast.List) else [argument]
                for text in map(_text, listed):
                    if _is_message(text):
                        yield f"{path.relative_to(ROOT)}:{argument.lineno}", " ".join(text.split())


def _patterns() -> dict[str, re.Pattern[str]]:
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    parts = {line: map(re.escape, line.strip(". ").split(_VALUE)) for line in lines}
    return {line: re.compile(".*".join(part)) for line, part in parts.items()}


def test_messages_are_collected() -> None:
    assert len(_messages()) > 300
    assert {"DatasetError", "KeyringCorrupt", "ParityError"} <= _error_classes()


def test_every_message_has_an_entry() -> None:
    patterns = _patterns().values()
    missing = [
        f"{where}: {text}"
        for where, text in _messages()
        if not any(pattern.search(text) for pattern in patterns)
    ]
    assert not missing, "add a pattern, cause and fix to docs/TROUBLESHOOTING.md for:\n" + (
        "\n".join(missing)
    )


def test_every_pattern_matches_a_message_of_the_code() -> None:
    texts = (_text(node) for path in sources() for node in nodes(path))
    code = "\n".join({" ".join(text.split()) for text in texts if text})
    assert not [line for line, pattern in _patterns().items() if not pattern.search(code)]


def test_patterns_are_specific() -> None:
    """A short pattern would also match messages that are added later for other reasons."""
    assert not [line for line in _patterns() if len(re.findall("[A-Za-z]", line)) < 9]


def test_every_entry_has_a_cause_and_a_fix() -> None:
    entries = PAGE.read_text("utf-8").split("```text\n")[1:]
    for entry in entries:
        text = entry.partition("\n```\n")[2].partition("\n#")[0]
        assert "**Cause.** " in text, entry
        assert "**Fix.** " in " ".join(text.split()) + " ", entry
