r"""Protect folders of images: anonymize, seal, open, recover, reveal, verify, index and search.

Examples:
    python3 tools/keyring.py --keyring keys.db --master master.key init
    python3 tools/protect.py protect photos sealed --checkpoint log/run --keyring keys.db \
        --master master.key --subject-from folder
    python3 tools/protect.py verify sealed --keyring keys.db --master master.key
    python3 tools/protect.py open sealed anonymized --keyring keys.db --master master.key
    python3 tools/protect.py recover sealed recovered --checkpoint log/run --keyring keys.db \
        --master master.key
    python3 tools/protect.py search query.jpg sealed --checkpoint log/run --keyring keys.db \
        --master master.key -k 5
    python3 tools/protect.py index sealed --checkpoint log/run --keyring keys.db \
        --master master.key
    python3 tools/protect.py protect photos archive --keep-original --checkpoint log/run \
        --keyring keys.db --master master.key --subject-from folder
    python3 tools/protect.py reveal archive answer --subject-file label.txt --keyring keys.db \
        --master master.key

After an interruption the same `protect`, `open`, `recover`, `reveal` or `index` command continues.
`torchrun --nproc_per_node N` divides `protect` among N processes (docs/DISTRIBUTED.md).
Exit codes: 0 all done, 1 some failed, 2 usage, 3 environment (disk, device), 4 keyring,
5 at least one authentication failure, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

if __name__ != "__mp_main__":  # worker processes import this file too and must not load torch
    from engine.api import Anonymizer
    from engine.distributed.processes import (
        device_of_rank,
        is_main,
        joined,
        leave,
        locked_by_main,
        share,
    )
    from engine.model import PUBLISHED_ARCHITECTURE
    from engine.vault.keyring import Keyring
    from engine.vault.opening import (
        OpenOptions,
        OutputFolder,
        accept_folder,
        checked_list,
        sealed_files,
        unseal,
        verify_folder,
        write_opened,
    )
    from engine.vault.protect import MAX_BATCH, ProtectOptions, Summary, protect_folder
    from engine.vault.reveal import CONTENTS_NAME, reveal
    from engine.vault.sealed_folder import SEALED_SUFFIX, check_apart
    from engine.vault.search import IndexSummary, complete_index, load_gallery, query_embedding
    from engine.vault.sources import list_sources
    from engine.vault.subjects import DEFAULT_PATTERN, SUBJECT_SOURCES, subject_rule
    from layers.pixels import PixelSpace
    from modeling.encryption.ised_errors import BadInput, IsedError, StorageError, UsageError
    from tools.lib.command_line import (
        Parser,
        add_json,
        answer,
        exit_code_of,
        number,
        shown,
        whole_number,
    )
    from tools.lib.keyring_access import (
        ENVIRONMENT,
        FileErrors,
        add_master_arguments,
        error_line,
        finishing,
        handling,
        interrupt,
        open_keyring,
        read_label,
        secrets_of,
    )
    from tools.lib.search_results import search_results, threshold_of
    from utils.files import WriteError, locked_folder
    from utils.logger import Progress

Command = Callable[[argparse.Namespace], int]
_CONTINUES = "interrupted; the same command continues"


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = _parser().parse_args(argv)
    run: Command = arguments.run

    def work() -> int:
        with handling({signal.SIGTERM: interrupt}), joined() as world:
            if world.size > 1 and run is not _protect:
                raise UsageError(
                    "torchrun started several processes, but only `protect` can share its work; "
                    "run this command without torchrun"
                )
            try:
                return run(arguments)
            except WriteError as error:  # a folder that cannot be written to is not a usage error
                raise StorageError(str(error)) from None

    resumable = (_protect, _open, _recover, _reveal, _index)
    interrupted = _CONTINUES if run in resumable else "interrupted"
    return exit_code_of(work, interrupted, line=error_line, failed=ENVIRONMENT)


# ---- the command line -----------------------------------------------------------------------


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Command, *paths: tuple[str, str]) -> Parser:
        text = (run.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, action=f"protect {name}")
        for path, meaning in paths:
            sub.add_argument(path, type=Path, help=meaning)
        sub.add_argument("--keyring", type=Path, required=True, help="keyring file")
        add_master_arguments(sub)
        add_json(sub)
        return sub

    sealed = ("sealed", "folder of sealed images, or one of them")
    inputs = (("input", "folder of images"), ("output", "folder of sealed files"))
    protect = command("protect", _protect, *inputs)
    _add_model(protect)
    _add_protect_options(protect)
    opening = command("open", _open, sealed, ("output", "folder for anonymized images"))
    colours = opening.add_mutually_exclusive_group()
    colours.add_argument("--checkpoint", type=Path, help="checkpoint whose pixel space to use")
    colours.add_argument(
        "--exact", action="store_true", help="write the stored bytes unchanged, not as colours"
    )
    recovering = command("recover", _recover, sealed, ("output", "folder for recovered images"))
    _add_model(recovering)
    recovering.add_argument(
        "--batch", type=whole_number(1), default=32, help="images per batch (32)"
    )
    for sub in (opening, recovering):
        sub.add_argument("--original-size", action="store_true", help="resize to the source's size")
    revealing = command(
        "reveal", _reveal, sealed, ("output", "folder for the files and their list")
    )
    revealing.add_argument(
        "--checkpoint", type=Path, help="recover images without an original by this checkpoint"
    )
    _add_device(revealing)
    revealing.set_defaults(device=None)
    whose = revealing.add_mutually_exclusive_group()
    whose.add_argument("--subject", help="only the files of this subject label; visible to others")
    whose.add_argument(
        "--subject-file",
        help="file whose first line is the label; - for standard input, before any passphrase",
    )
    for sub in (opening, recovering, revealing):
        sub.add_argument("--overwrite", action="store_true", help="replace existing files")
    verifying = command("verify", _verify, ("sealed", "folder of sealed images"))
    verifying.add_argument(
        "--accept", action="store_true",
        help="afterwards write a new manifest of the files that can be opened now",
    )  # fmt: skip
    finding = command("search", _search)
    finding.add_argument("query", type=Path, nargs="+", help="images, raw or sealed")
    finding.add_argument("sealed", type=Path, help=sealed[1])
    _add_model(finding)
    finding.add_argument("-k", type=whole_number(1), default=10, help="matches per query (10)")
    finding.add_argument(
        "--threshold", type=number(-1, 1), metavar="COSINE",
        help="lowest similarity of a match (from the checkpoint's calibration.json)",
    )  # fmt: skip
    indexing = command("index", _index, ("sealed", "folder of sealed images"))
    _add_model(indexing)
    indexing.add_argument("--batch", type=whole_number(1), default=32, help="images per batch (32)")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="OUTPUT_DIR of a training in mode GCR"
    )
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def _add_protect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--subject-from", default="folder", choices=SUBJECT_SOURCES,
        help="whose key: the image's folder (default), a regular expression on its path, a "
        "table, or none: every image gets its own key",
    )  # fmt: skip
    parser.add_argument(
        "--subject-regex", default=DEFAULT_PATTERN, help="with group 'subject' (Market-1501 names)"
    )
    parser.add_argument("--subject-csv", type=Path, help="table with columns path, subject")
    parser.add_argument("--dataset", help="name in labels and output names (the input's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    parser.add_argument(
        "--keep-original", action="store_true",
        help="also seal the source files, under another key of the subject: a person with that key "
        "has the photographs themselves (docs/OPERATING.md)",
    )  # fmt: skip
    parser.add_argument(
        "--index", action=argparse.BooleanOptionalAction, default=True,
        help="also write an encrypted embedding of each image, for search (default: --index)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=whole_number(1, MAX_BATCH), default=32,
        help=f"images per batch, up to {MAX_BATCH} (32)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=whole_number(0), default=2,
        help="processes that read and seal; 0 for none (2)",
    )  # fmt: skip


# ---- the commands -----------------------------------------------------------------------------


def _protect(arguments: argparse.Namespace) -> int:
    """Anonymize every image below a folder and seal it."""
    _check_paths(arguments, arguments.input)
    dataset = arguments.dataset or arguments.input.resolve().name
    pattern, table = arguments.subject_regex, arguments.subject_csv
    rule = subject_rule(arguments.subject_from, dataset, pattern=pattern, table=table)
    options = ProtectOptions(
        dataset,
        rule,
        arguments.batch,
        arguments.workers,
        arguments.overwrite,
        arguments.keep_original,
        arguments.index,
    )
    source = list_sources(arguments.input, arguments.output)
    total = len(share(source.images))
    failures = FileErrors()
    with (
        answer(as_json=arguments.json) as show,
        locked_by_main(arguments.output),
        open_keyring(arguments) as keyring,
    ):
        model = _load_model(arguments)
        with finishing() as stop, Progress(total, "Protect") as bar:

            def report(path: str, error: IsedError | None) -> None:
                bar.update()
                failures.add(path, error)

            summary = protect_folder(
                source, arguments.output, model, keyring, options, report=report, stop=stop
            )
            keyring.use.failed = summary.failed
            if summary.interrupted:
                keyring.use.result = "interrupted"
            if not is_main():
                return 0  # the main process reports for all
        lines = [_summary_text(summary, arguments, bar.rate, source.left_out)]
        if arguments.index and summary.digests and not summary.interrupted:
            index = _complete_index(arguments.output, keyring, model, arguments.batch)
            summary.interrupted = index.interrupted
            if index.interrupted:
                lines.append(_CONTINUES)
            if index.added:  # of a killed run, or sealed without an index
                lines.append(f"index: {index.added} images that were sealed before were added")
        counts = {name: value for name, value in vars(summary).items() if name != "digests"}
        # The counts are those of all processes, the errors those of this one.
        content = {"output": arguments.output, **failures.as_json(), **counts}
        show(content | {"images_per_s": bar.rate}, "\n".join(lines))
    return 130 if summary.interrupted else summary.exit_code


def _open(arguments: argparse.Namespace) -> int:
    """Write anonymized images as PNG files."""
    if arguments.checkpoint is None:
        pixels = _published_pixels()
    else:
        pixels = Anonymizer.from_checkpoint(arguments.checkpoint, device="cpu").pixels
    return _write(arguments, OpenOptions(pixels, exact=arguments.exact))


def _published_pixels() -> PixelSpace:
    published = PUBLISHED_ARCHITECTURE
    return PixelSpace(published["INPUT.PIXEL_MEAN"], published["INPUT.PIXEL_STD"])


def _recover(arguments: argparse.Namespace) -> int:
    """Run the recovery network on sealed images and write PNG files."""
    model = _load_model(arguments)
    return _write(arguments, OpenOptions(model.pixels, model, batch=arguments.batch))


def _reveal(arguments: argparse.Namespace) -> int:
    """Write source files bit for bit, or images where no source file was kept, and their list."""
    if arguments.device is not None and arguments.checkpoint is None:
        raise UsageError("--device is for the networks of --checkpoint; give both or none")
    _check_paths(arguments, arguments.sealed)
    subject = arguments.subject
    if arguments.subject_file is not None:
        subject = read_label(arguments.subject_file)
    options = OpenOptions(_published_pixels())
    if arguments.checkpoint is not None:
        model = _load_model(arguments)
        options = OpenOptions(model.pixels, model)
    folder = OutputFolder(arguments.output, overwrite=arguments.overwrite)
    counts, failures = dict.fromkeys(("original", "recovered", "anonymized"), 0), FileErrors()
    with answer(as_json=arguments.json) as show:
        with open_keyring(arguments) as keyring:
            for revealed in reveal(
                arguments.sealed, folder, keyring, options, subject, note=_print_note
            ):
                failures.add(revealed.sealed, revealed.error)
                if revealed.error is None:
                    counts[revealed.content] += 1
            keyring.use.failed = failures.count
        done = ", ".join(f"{count} {content}" for content, count in counts.items())
        contents = arguments.output / CONTENTS_NAME
        text = shown(f"{arguments.output}: {done}, {failures.count} failed")
        content = {"output": arguments.output, "contents": contents, **counts}
        show(content | failures.as_json(), f"{text}\n{shown(f'list of contents: {contents}')}")
    return failures.exit_code


def _verify(arguments: argparse.Namespace) -> int:
    """Open every file of a folder and compare the folder with its sealed manifest."""
    failures, accepted = FileErrors(), None
    with answer(as_json=arguments.json) as show:
        with open_keyring(arguments) as keyring:
            for file in verify_folder(arguments.sealed, keyring):
                failures.add(file.path, file.error)
            keyring.use.failed = failures.count
            if arguments.accept:
                accepted = accept_folder(arguments.sealed, keyring)
        text = f"{arguments.sealed}: {failures.good} good, {failures.count} failed"
        note = "" if accepted is None else f"\nnew manifest of {accepted} files"
        content = {"folder": arguments.sealed, "good": failures.good, "accepted": accepted}
        show(content | failures.as_json(), shown(text) + note)
    return failures.exit_code


def _search(arguments: argparse.Namespace) -> int:
    """Print the sealed images that show the same person as each query image."""
    model, failures = _load_model(arguments), FileErrors()
    with open_keyring(arguments) as keyring:
        queries = []
        for path in arguments.query:
            try:
                queries.append(query_embedding(path, keyring, model))
            except IsedError as error:
                failures.add(path, error.of_one_file())
        results, unusable = [], []
        if queries:
            dim = len(queries[0].vector)
            gallery = load_gallery(arguments.sealed, keyring, model, dim, note=_print_note)
            thresholds = {
                kind: threshold_of(kind, arguments.threshold, arguments.checkpoint, _print_note)
                for kind in dict.fromkeys(query.kind for query in queries)
            }
            results = list(search_results(queries, gallery, keyring, thresholds, arguments.k))
            unusable = [*gallery.unusable, *(file for each in results for file in each.unusable)]
        keyring.use.failed = len(unusable)
    for file in unusable:
        failures.add(file.path, file.error)
    lines = []
    for result in results:
        heading = [shown(f"{result.query}:")] if len(arguments.query) > 1 else []
        lines += heading + result.lines()
    with answer(as_json=arguments.json) as show:
        show([result.as_json() for result in results], "\n".join(lines))
    return failures.exit_code


def _index(arguments: argparse.Namespace) -> int:
    """Create the index of a folder for `search`, or add what is missing in it."""
    if not arguments.sealed.is_dir():
        raise BadInput(f"{arguments.sealed} is not a folder; expected a folder of sealed images")
    failures = FileErrors()
    with answer(as_json=arguments.json) as show:
        with locked_folder(arguments.sealed), open_keyring(arguments) as keyring:
            model = _load_model(arguments)
            summary = _complete_index(arguments.sealed, keyring, model, arguments.batch)
            keyring.use.failed = len(summary.failed)
            if summary.interrupted:
                keyring.use.result = "interrupted"
        for file in summary.failed:
            failures.add(file.path, file.error)
        content = {"folder": arguments.sealed, "added": summary.added, "present": summary.present}
        content |= {"interrupted": summary.interrupted, **failures.as_json()}
        text = f"{summary.added} added, {summary.present} already present, {failures.count} failed"
        more = f"\n{_CONTINUES}" * summary.interrupted
        show(content, shown(f"index of {arguments.sealed}: {text}") + more)
    return 130 if summary.interrupted else failures.exit_code


def _complete_index(folder: Path, keyring: Keyring, model: Anonymizer, batch: int) -> IndexSummary:
    """Add the missing vectors to the index of a folder; Ctrl-C and `kill` end after a batch."""
    files = sealed_files(folder)
    with finishing() as stop, Progress(len(files), "Index") as bar:
        return complete_index(
            folder, files, keyring, model, batch=batch, progress=bar.update, stop=stop
        )


def _write(arguments: argparse.Namespace, options: OpenOptions) -> int:
    _check_paths(arguments, arguments.sealed)
    files, failures = sealed_files(arguments.sealed), FileErrors()
    folder = OutputFolder(arguments.output, overwrite=arguments.overwrite)
    options = replace(options, original_size=arguments.original_size)
    with answer(as_json=arguments.json) as show:
        with open_keyring(arguments) as keyring, Progress(len(files), "Open") as bar:
            listed, problems = checked_list(
                arguments.sealed, keyring, (SEALED_SUFFIX,), _print_note
            )
            for problem in problems:
                failures.add(problem.path, problem.error)
            opened = unseal(files, keyring.opening_key, listed)
            for file in write_opened(opened, folder, options):
                bar.update()
                failures.add(file.path, file.error)
            keyring.use.failed = failures.count
        text = f"{arguments.output}: {failures.good} images, {failures.count} failed"
        content = {"output": arguments.output, "images": failures.good}
        show(content | failures.as_json(), shown(text))
    return failures.exit_code


def _check_paths(arguments: argparse.Namespace, source: Path) -> None:
    """Raise UsageError for folders that overlap, and for secrets in the output folder."""
    check_apart(source, arguments.output, arguments.keyring)
    output = arguments.output.resolve()
    for secret in secrets_of(arguments):
        if output in secret.resolve().parents:
            raise UsageError(
                f"{secret} opens the keyring and is in the output folder {arguments.output}; "
                "keep it elsewhere"
            )


def _load_model(arguments: argparse.Namespace) -> Anonymizer:
    device = str(device_of_rank(arguments.device or "auto"))
    return Anonymizer.from_checkpoint(arguments.checkpoint, device=device)


def _summary_text(
    summary: Summary, arguments: argparse.Namespace, rate: float, left_out: Sequence[str]
) -> str:
    counts = (
        f"{summary.sealed} sealed, {summary.present} already present, {summary.failed} failed, "
        f"{summary.left_out} left out"
    )
    if summary.not_reached:
        counts += f", {summary.not_reached} not reached"
    lines = [shown(f"{arguments.output}: {counts} ({rate:.1f} images/s)")]
    if summary.originals:
        lines.append(
            f"{summary.originals} originals sealed: their keys open the photographs themselves"
        )
    if summary.exif:
        kept = "is only in the originals" if arguments.keep_original else "was not kept"
        lines.append(f"EXIF data of {summary.exif} images {kept}; orientation was applied")
    if summary.interrupted:
        lines.append(_CONTINUES)
    if left_out:  # a user may delete a HEIC original, believing that everything was sealed
        lines.append(f"left out because they are not images: e.g. {shown(left_out[0])}")
    return "\n".join(lines)


def _print_note(text: str) -> None:
    print(shown(text), file=sys.stderr)


if __name__ == "__main__":
    leave(main())
