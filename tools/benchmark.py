"""Measure speed and memory: python3 tools/benchmark.py retrieval --size market."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from tools.lib.command_line import Parser, answer, exit_code_of
from utils.files import write_text

# Subcommand -> module with `add_arguments(parser)` and `run(arguments)`. They are imported in
# main(), since worker processes import this file and most need no torch.
BENCHMARKS = {
    "data": "tools.benchmarks.data",
    "step": "tools.benchmarks.step",
    "eval": "tools.benchmarks.evaluation",
    "retrieval": "tools.benchmarks.retrieval",
    "ised": "tools.benchmarks.ised",
    "search": "tools.benchmarks.search",
    "archive": "tools.benchmarks.archive",
}

STANDARD_OUTPUT = Path("-")
_EXAMPLES = """examples:
  python3 tools/benchmark.py data
  python3 tools/benchmark.py step --batch 16
  python3 tools/benchmark.py retrieval --size market
  python3 tools/benchmark.py ised --json
  python3 tools/benchmark.py search --vectors 100000
  python3 tools/benchmark.py archive --files 2000 20000

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
        command = commands.add_parser(name, help=summary, description=text)
        module.add_arguments(command)
        command.add_argument(
            "--json", type=Path, nargs="?", const=STANDARD_OUTPUT, metavar="FILE",
            help="also write the numbers to a file; without FILE, as the last option, print JSON "
            "and send everything else to standard error",
        )  # fmt: skip
    arguments = parser.parse_args(argv)

    def work() -> None:
        with answer(as_json=arguments.json == STANDARD_OUTPUT) as show:
            numbers = modules[arguments.command].run(arguments)
            show(numbers)
        if arguments.json not in (None, STANDARD_OUTPUT):
            write_text(arguments.json, json.dumps(numbers, indent=2) + "\n")
            print(f"The numbers are in {arguments.json}")

    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main())
