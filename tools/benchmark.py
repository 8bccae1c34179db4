"""Measure speed and memory: python3 tools/benchmark.py retrieval --size market."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from tools.lib.command_line import Parser, exit_code_of

# Subcommand -> module with `add_arguments(parser)` and `run(arguments)`. They are imported in
# main(), since worker processes import this file and most need no torch.
BENCHMARKS = {
    "data": "tools.benchmarks.data",
    "step": "tools.benchmarks.step",
    "eval": "tools.benchmarks.evaluation",
    "retrieval": "tools.benchmarks.retrieval",
    "ised": "tools.benchmarks.ised",
}

_EXAMPLES = """examples:
  python3 tools/benchmark.py data
  python3 tools/benchmark.py step --batch 16
  python3 tools/benchmark.py retrieval --size market

--help after a name lists its options.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; return the exit code."""
    parser = Parser(description="Measure speed and memory on this machine.", epilog=_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: import_module(path) for name, path in BENCHMARKS.items()}
    for name, module in modules.items():
        text = module.__doc__ or ""
        summary = text.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=text))
    arguments = parser.parse_args(argv)

    def work() -> None:
        modules[arguments.command].run(arguments)

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main())
