"""The ``securereid`` command: one entry for all programs of the project."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from typing import Any

import utils.program  # noqa: F401 - acts before other imports
from utils.errors import optional_package

# Commands by task: name, module with ``main(argv)``, arguments that the name implies, what it does.
COMMANDS: dict[str, tuple[tuple[str, str, tuple[str, ...], str], ...]] = {
    "Prepare data": (
        ("data", "tools.data", (), "check data sets; draw contact sheets, or people to try with"),
        ("split", "data.train_split", (), "make a validation split of a training set"),
    ),
    "Train and evaluate": (
        ("train", "tools.main", (), "train a model and evaluate it"),
        ("evaluate", "tools.main", ("TEST.EVALUATE_ONLY", "on"), "evaluate a trained model"),
        ("reproduce", "tools.reproduce", (), "train rows of a table over several seeds"),
        ("compare", "tools.compare", (), "test differences between evaluations, query by query"),
        ("report", "tools.report", (), "write an HTML page about one or more runs"),
        ("visualize", "tools.visualize", (), "draw ranked lists, activation maps and image stages"),
    ),
    "Protect and search images": (
        ("keyring", "tools.keyring", (), "create and manage the keys of subjects"),
        ("protect", "tools.protect", (), "seal folders of images; open, verify, search them"),
        ("match", "tools.match", (), "decide whether two images show the same person"),
        ("export", "tools.export", (), "write the networks as ONNX files"),
    ),
    "Attack": (
        ("attack", "tools.attack", (), "measure what attackers achieve at each level"),
        ("frontier", "tools.frontier", (), "plot privacy against utility"),
    ),
    "Try and measure": (
        ("demo", "tools.demo", (), "the whole method on synthetic people"),
        ("benchmark", "tools.benchmark", (), "measure speed and memory"),
    ),
}
_EXAMPLES = """
examples:
  securereid demo
  securereid train --config_file configs/demo.yml OUTPUT_DIR log/run
  securereid protect --help

Shell completion: pip install argcomplete, then
  eval "$(register-python-argcomplete securereid)"
"""


def help_text() -> str:
    """Return all commands, grouped by task."""
    lines = ["usage: securereid COMMAND [ARGUMENT ...]", ""]
    for task, commands in COMMANDS.items():
        lines += [f"{task}:", *(f"  {name:<11}{text}" for name, _, _, text in commands), ""]
    lines.append("securereid COMMAND --help describes a command.")
    return "\n".join(lines) + "\n" + _EXAMPLES


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    commands: dict[str, list[Any]] = {
        name: entry for group in COMMANDS.values() for name, *entry in group
    }
    if "_ARGCOMPLETE" in os.environ:
        return _complete(commands)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    name, *rest = arguments
    if name not in commands:
        similar = difflib.get_close_matches(name, commands, n=1)
        advice = f"did you mean {similar[0]}?" if similar else f"one of {', '.join(commands)}"
        print(f"error: {name!r} is not a command; {advice}", file=sys.stderr)
        return 2
    module, implied, _ = commands[name]
    sys.argv = [f"securereid {name}", *rest]  # what argparse prints as the program
    code: int = importlib.import_module(module).main([*rest, *implied])
    return code


def _complete(commands: dict[str, list[Any]]) -> int:
    """Answer argcomplete: the names of commands, or the options of the command that was typed."""
    argcomplete = optional_package("argcomplete", "shell completion", "pip install argcomplete")
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    words = argcomplete.split_line(line, point)[3]
    if len(words) > 1 and words[1] in commands:
        os.environ["_ARGCOMPLETE"] = "2"  # the program's parser reads the words after the command
        importlib.import_module(commands[words[1]][0]).main([])
        return 0
    parser = argparse.ArgumentParser(prog="securereid")
    parser.add_argument("command", choices=list(commands))
    argcomplete.autocomplete(parser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
