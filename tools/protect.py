r"""Protect folders of pictures: anonymize and seal them; open, recover, verify or search them.

Examples:
    python3 tools/keyring.py --keyring keys.db --master master.key init
    python3 tools/protect.py protect photos sealed --checkpoint log/run --keyring keys.db \
        --master master.key --subject-from folder
    python3 tools/protect.py verify sealed --keyring keys.db --master master.key
    python3 tools/protect.py open sealed anonymized --keyring keys.db --master master.key
    python3 tools/protect.py recover sealed recovered --checkpoint log/run --keyring keys.db \
        --master master.key
    python3 tools/protect.py search someone.jpg sealed --checkpoint log/run --keyring keys.db \
        --master master.key -k 5

The same `protect`, `open` or `recover` goes on after an interruption; `torchrun --nproc_per_node N`
shares `protect` among N processes (docs/DISTRIBUTED.md). Exit codes: 0 all done, 1 some failed,
2 usage, 3 environment (disk, device), 4 keyring, 5 at least one authentication failure,
130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

if __name__ != "__mp_main__":  # workers run this file again and need none of it: no torch
    from engine.distributed.group import joined, leave
    from engine.distributed.processes import is_main, share
    from engine.distributed.signals import handling
    from engine.vault.protect import MAX_BATCH, ProtectOptions, Summary, protect_folder
    from engine.vault.sealing_work import Outcome
    from engine.vault.sources import list_sources, other_files
    from engine.vault.subjects import DEFAULT_PATTERN, SUBJECT_SOURCES, subject_rule
    from modeling.encryption.ised_errors import UsageError
    from tools.lib.command_line import Parser, exit_code_of, shown, whole_number
    from tools.lib.keyring_access import (
        ENVIRONMENT,
        add_master_arguments,
        error_line,
        open_keyring,
    )
    from tools.sealed_pictures import (
        check_places,
        load_model,
        open_pictures,
        recover,
        search_pictures,
        verify,
    )
    from utils.progress import Progress

Command = Callable[[argparse.Namespace], int]
_GOES_ON = "interrupted; the same command goes on"


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = _parser().parse_args(argv)
    run: Command = arguments.run

    def work() -> int:
        with handling({signal.SIGTERM: _interrupt}), joined() as here:
            if here.size > 1 and run is not _protect:
                raise UsageError("torchrun shares out `protect` only; run this without it")
            return run(arguments)

    goes_on = run in (_protect, open_pictures, recover)  # others start anew
    told = _GOES_ON if goes_on else "interrupted"
    return exit_code_of(work, told, line=error_line, failed=ENVIRONMENT)


def _interrupt(*_: object) -> None:
    """Let `kill` end a command like Ctrl-C does: the file under way is dropped."""
    raise KeyboardInterrupt


def _parser() -> Parser:
    """Return the command line."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command, *places: tuple[str, str]) -> Parser:
        text = (run.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        for place, meaning in places:
            sub.add_argument(place, type=Path, help=meaning)
        sub.add_argument("--keyring", type=Path, required=True, help="keyring file")
        add_master_arguments(sub)
        return sub

    sealed = ("sealed", "folder of sealed pictures, or one of them")
    protect = command(
        "protect", _protect, ("input", "folder of pictures"), ("output", "folder of sealed files")
    )
    _add_model(protect)
    _add_protect_options(protect)
    opening = command("open", open_pictures, sealed, ("output", "folder for anonymized pictures"))
    opening.add_argument("--checkpoint", type=Path, help="training whose pixel space to use")
    opening.add_argument(
        "--exact", action="store_true", help="write the stored bytes unchanged, not as colours"
    )
    recovering = command("recover", recover, sealed, ("output", "folder for recovered pictures"))
    _add_model(recovering)
    recovering.add_argument(
        "--batch", type=whole_number(1), default=32, help="pictures per batch (32)"
    )
    for sub in (opening, recovering):
        sub.add_argument("--original-size", action="store_true", help="resize to the source's size")
        sub.add_argument("--overwrite", action="store_true", help="replace files that are there")
    verifying = command("verify", verify, ("sealed", "folder of sealed pictures"))
    verifying.add_argument(
        "--accept", action="store_true", help="afterwards take what opens now for the whole folder"
    )
    find = command("search", search_pictures, ("query", "picture, raw or sealed"), sealed)
    _add_model(find)
    find.add_argument("-k", type=whole_number(1), default=10, help="how many (10)")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add what chooses the networks."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="OUTPUT_DIR of a training in mode GCR"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def _add_protect_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `protect`."""
    parser.add_argument(
        "--subject-from", default="folder", choices=SUBJECT_SOURCES,
        help="whose key: the picture's folder (default), a regular expression on its path, a "
        "table, or a key of its own for every picture",
    )  # fmt: skip
    parser.add_argument(
        "--subject-regex", default=DEFAULT_PATTERN, help="with group 'subject' (Market-1501 names)"
    )
    parser.add_argument("--subject-csv", type=Path, help="table with columns path, subject")
    parser.add_argument("--dataset", help="name in labels and output names (the input's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--batch", type=whole_number(1, MAX_BATCH), default=32,
        help=f"pictures per batch, up to {MAX_BATCH} (32)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=whole_number(0), default=2,
        help="processes that read and seal; 0 for none (2)",
    )  # fmt: skip


def _protect(arguments: argparse.Namespace) -> int:
    """Anonymize every picture below a folder and seal it."""
    check_places(arguments, arguments.input)
    dataset = arguments.dataset or arguments.input.resolve().name
    rule = subject_rule(
        arguments.subject_from,
        dataset,
        pattern=arguments.subject_regex,
        table=arguments.subject_csv,
    )
    options = ProtectOptions(dataset, rule, arguments.batch, arguments.workers, arguments.overwrite)
    total, stop = len(share(list_sources(arguments.input))), threading.Event()
    # Ctrl-C and `kill` end it after what is under way.
    finishing = dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: stop.set())
    with open_keyring(arguments) as keyring:
        model = load_model(arguments)
        with handling(finishing), Progress(total, "Protect") as bar:

            def report(outcome: Outcome) -> None:
                bar.update()
                if outcome.error is not None:
                    print(f"error: {error_line(outcome.error, outcome.path)}", file=sys.stderr)

            summary = protect_folder(
                arguments.input, arguments.output, model, keyring, options, report=report, stop=stop
            )
            if not is_main():
                return 0  # the first speaks for all
            _say(summary, arguments.output, bar.rate)
    others = other_files(arguments.input)
    if others:  # a HEIC or GIF whose original somebody deletes, trusting that all was sealed
        print(f"{len(others)} other files were left out, the first is {shown(others[0])}")
    return 130 if summary.interrupted else summary.exit_code


def _say(summary: Summary, output: Path, rate: float) -> None:
    """Print what became of a folder."""
    counts = f"{summary.sealed} sealed, {summary.kept} there already, {summary.failed} failed"
    print(shown(f"{output}: {counts} ({rate:.1f} pictures/s)"))
    if summary.exif:
        print(f"EXIF data of {summary.exif} pictures was not kept; orientation was applied")
    if summary.interrupted:
        print(_GOES_ON)


if __name__ == "__main__":
    leave(main())
