"""The commands of `tools/protect.py` that open sealed pictures: open, recover, verify, search."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.api import PUBLISHED, Anonymizer
from engine.distributed.group import device_of_rank
from engine.vault.opening import (
    OpenOptions,
    Unsealed,
    accept_folder,
    query_embedding,
    sealed_files,
    search,
    unseal,
    verify_folder,
    write_opened,
)
from engine.vault.sealed_folder import check_apart
from layers.pixels import PixelSpace
from modeling.encryption.ised_errors import IsedError, UsageError
from tools.lib.command_line import shown
from tools.lib.keyring_access import error_line, open_keyring
from utils.progress import Progress


def check_places(arguments: argparse.Namespace, source: Path) -> None:
    """Refuse folders that lie in each other, and secrets in a folder that will be given away."""
    check_apart(source, arguments.output, arguments.keyring)
    output = arguments.output.resolve()
    for secret in (arguments.master, arguments.passphrase_file):
        if secret not in (None, "-") and output in Path(secret).resolve().parents:
            raise UsageError(f"{secret} opens the keyring and must not lie in {arguments.output}")


def load_model(arguments: argparse.Namespace) -> Anonymizer:
    """Load the networks of the command line."""
    chosen = str(device_of_rank(arguments.device))
    return Anonymizer.from_checkpoint(arguments.checkpoint, device=chosen)


def open_pictures(arguments: argparse.Namespace) -> int:
    """Give anonymized pictures back as PNG files."""
    if arguments.checkpoint is None:
        pixels = PixelSpace(PUBLISHED["INPUT.PIXEL_MEAN"], PUBLISHED["INPUT.PIXEL_STD"])
    else:
        pixels = Anonymizer.from_checkpoint(arguments.checkpoint, device="cpu").pixels
    return _write(arguments, OpenOptions(pixels, exact=arguments.exact))


def recover(arguments: argparse.Namespace) -> int:
    """Run the recovery network on sealed pictures and write PNG files."""
    model = load_model(arguments)
    return _write(arguments, OpenOptions(model.pixels, model, batch=arguments.batch))


def _write(arguments: argparse.Namespace, options: OpenOptions) -> int:
    """Open sealed pictures into a folder."""
    check_places(arguments, arguments.sealed)
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
    print(shown(f"{arguments.output}: {len(files) - failed} pictures, {failed} failed"))
    return max(codes)


def verify(arguments: argparse.Namespace) -> int:
    """Open every file of a folder and compare the folder with its sealed manifest."""
    with open_keyring(arguments) as keyring:
        codes = [_code(file) for file in verify_folder(arguments.sealed, keyring)]
        failed = sum(code > 0 for code in codes)
        print(shown(f"{arguments.sealed}: {len(codes) - failed} good, {failed} failed"))
        if arguments.accept:
            print(f"new manifest of {accept_folder(arguments.sealed, keyring)} files")
    return max(codes)


def search_pictures(arguments: argparse.Namespace) -> int:
    """Show the sealed pictures most like a query picture."""
    model = load_model(arguments)
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
