"""Measure speed and memory: python3 tools/benchmark.py retrieval --size market."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from tools.benchmarks import data, evaluation, ised, retrieval, step
from tools.lib.command_line import Parser, exit_code_of

# Name of the subcommand -> module with ``add_arguments(parser)`` and ``run(arguments)``.
BENCHMARKS: dict[str, ModuleType] = {
    "data": data, "step": step, "eval": evaluation, "retrieval": retrieval, "ised": ised,
}  # fmt: skip

_EXAMPLES = """examples:
  python3 tools/benchmark.py data
  python3 tools/benchmark.py step --batch 16
  python3 tools/benchmark.py retrieval --size market

Each says more with --help behind its name.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    parser = Parser(
        description="Measure speed and memory on this machine.",
        epilog=_EXAMPLES,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in BENCHMARKS.items():
        text = module.__doc__ or ""
        summary = text.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=text))
    arguments = parser.parse_args(argv)

    def work() -> None:
        BENCHMARKS[arguments.command].run(arguments)

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main())
