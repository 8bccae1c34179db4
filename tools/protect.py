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
    from engine.api import PUBLISHED, Anonymizer
    from engine.distributed import device_of_rank, joined, leave
    from engine.processes import is_main, share
    from engine.protecting.opened_folder import OpenOptions, write_opened
    from engine.protecting.protection import MAX_BATCH, ProtectOptions, Summary, protect_folder
    from engine.protecting.sealed_folder import check_apart
    from engine.protecting.sealing_work import Outcome
    from engine.protecting.source_images import list_sources, other_files
    from engine.protecting.subjects import DEFAULT_PATTERN, SUBJECT_SOURCES, subject_rule
    from engine.protecting.unsealing import (
        Unsealed,
        accept_folder,
        query_embedding,
        sealed_files,
        search,
        unseal,
        verify_folder,
    )
    from engine.signals import handling
    from layers.pixels import PixelSpace
    from modeling.encryption.errors import IsedError, UsageError
    from tools.command_line import Parser, exit_code_of, whole_number
    from tools.keyring_access import (
        ENVIRONMENT,
        add_master_arguments,
        error_line,
        open_keyring,
    )
    from utils.progress import Progress
    from utils.terminal import shown

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

    told = _GOES_ON if run in (_protect, _open, _recover) else "interrupted"  # others start anew
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
    opening = command("open", _open, sealed, ("output", "folder for anonymized pictures"))
    opening.add_argument("--checkpoint", type=Path, help="training whose pixel space to use")
    opening.add_argument(
        "--exact", action="store_true", help="write the stored bytes unchanged, not as colours"
    )
    recover = command("recover", _recover, sealed, ("output", "folder for recovered pictures"))
    _add_model(recover)
    recover.add_argument(
        "--batch", type=whole_number(1), default=32, help="pictures per batch (32)"
    )
    for sub in (opening, recover):
        sub.add_argument("--original-size", action="store_true", help="resize to the source's size")
        sub.add_argument("--overwrite", action="store_true", help="replace files that are there")
    verify = command("verify", _verify, ("sealed", "folder of sealed pictures"))
    verify.add_argument(
        "--accept", action="store_true", help="afterwards take what opens now for the whole folder"
    )
    find = command("search", _search, ("query", "picture, raw or sealed"), sealed)
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


def _check_places(arguments: argparse.Namespace, source: Path) -> None:
    """Refuse folders that lie in each other, and secrets in a folder that will be given away."""
    check_apart(source, arguments.output, arguments.keyring)
    output = arguments.output.resolve()
    for secret in (arguments.master, arguments.passphrase_file):
        if secret not in (None, "-") and output in Path(secret).resolve().parents:
            raise UsageError(f"{secret} opens the keyring and must not lie in {arguments.output}")


def _model(arguments: argparse.Namespace) -> Anonymizer:
    """Load the networks of the command line."""
    chosen = str(device_of_rank(arguments.device))
    return Anonymizer.from_checkpoint(arguments.checkpoint, device=chosen)


def _protect(arguments: argparse.Namespace) -> int:
    """Anonymize every picture below a folder and seal it."""
    _check_places(arguments, arguments.input)
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
        model = _model(arguments)
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
    print(
        f"{output}: {summary.sealed} sealed, {summary.kept} there already, {summary.failed} failed "
        f"({rate:.1f} pictures/s)"
    )
    if summary.exif:
        print(f"EXIF data of {summary.exif} pictures was not kept; orientation was applied")
    if summary.interrupted:
        print(_GOES_ON)


def _open(arguments: argparse.Namespace) -> int:
    """Give anonymized pictures back as PNG files."""
    if arguments.checkpoint is None:
        pixels = PixelSpace(PUBLISHED["INPUT.PIXEL_MEAN"], PUBLISHED["INPUT.PIXEL_STD"])
    else:
        pixels = Anonymizer.from_checkpoint(arguments.checkpoint, device="cpu").pixels
    return _write(arguments, OpenOptions(pixels, exact=arguments.exact))


def _recover(arguments: argparse.Namespace) -> int:
    """Run the recovery network on sealed pictures and write PNG files."""
    model = _model(arguments)
    return _write(arguments, OpenOptions(model.pixels, model, batch=arguments.batch))


def _write(arguments: argparse.Namespace, options: OpenOptions) -> int:
    """Open sealed pictures into a folder."""
    _check_places(arguments, arguments.sealed)
    files = sealed_files(arguments.sealed)
    with open_keyring(arguments) as keyring, Progress(len(files), "Open") as bar:
        codes = [0]
        for file in write_opened(
            unseal(files, keyring),
            arguments.output,
            options,
            original_size=arguments.original_size,
            overwrite=arguments.overwrite,
        ):
            bar.update()
            codes.append(_code(file))
    failed = sum(code > 0 for code in codes)
    print(f"{arguments.output}: {len(files) - failed} pictures, {failed} failed")
    return max(codes)


def _verify(arguments: argparse.Namespace) -> int:
    """Open every file of a folder and compare the folder with its sealed manifest."""
    with open_keyring(arguments) as keyring:
        codes = [_code(file) for file in verify_folder(arguments.sealed, keyring)]
        failed = sum(code > 0 for code in codes)
        print(f"{arguments.sealed}: {len(codes) - failed} good, {failed} failed")
        if arguments.accept:
            print(f"new manifest of {accept_folder(arguments.sealed, keyring)} files")
    return max(codes)


def _search(arguments: argparse.Namespace) -> int:
    """Show the sealed pictures most like a query picture."""
    model = _model(arguments)
    with open_keyring(arguments) as keyring:
        try:
            query = query_embedding(arguments.query, keyring, model)
        except IsedError as error:
            return _code(Unsealed(arguments.query, error=error))
        files = unseal(sealed_files(arguments.sealed), keyring)
        matches, unusable = search(query, files, model, arguments.k)
    for rank, match in enumerate(matches, 1):
        print(f"{rank:4d}  {match.similarity:+.4f}  {shown(f'{match.file}  {match.path}')}")
    return max([0, *(_code(file) for file in unusable)])


def _code(file: Unsealed) -> int:
    """Report a file's error, if any; return the exit code it asks for."""
    if file.error is None:
        return 0
    print(f"error: {error_line(file.error, str(file.path))}", file=sys.stderr)
    return file.error.exit_code


if __name__ == "__main__":
    leave(main())
