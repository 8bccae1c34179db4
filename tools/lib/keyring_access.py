"""Options, passphrases, labels and errors of all commands that open a keyring."""

from __future__ import annotations

import argparse
import getpass
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile, Master, Passphrase
from engine.vault.secret_files import forbid_memory_dumps, read_private
from modeling.encryption.ised_errors import UsageError
from tools.lib.command_line import shown
from utils.files import check_regular

ENVIRONMENT = 3  # exit code after a failure of a disk or device
_MAX_LABEL_CHARS = 4096  # more than any label has


def add_master_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --master and --passphrase-file, of which at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--master", type=Path, help="master key file (mode 600)")
    group.add_argument(
        "--passphrase-file",
        help="file whose first line is the passphrase (mode 600), - for standard input; "
        "asked for on the terminal if neither is given",
    )


def open_keyring(arguments: argparse.Namespace) -> Keyring:
    """Open the keyring of a command line."""
    return Keyring.open(arguments.keyring, master_from(arguments.master, arguments.passphrase_file))


def error_line(error: Exception, path: str = "") -> str:
    """Return path, class and message of an error, without characters that steer a terminal."""
    return shown(f"{path}: " * bool(path) + f"{type(error).__name__}: {error}")


def master_from(
    key_file: Path | None, passphrase_file: str | None, *, confirm: bool = False
) -> Master:
    """Return the master that the arguments describe; forbid memory dumps first.

    Args:
        key_file: Value of --master.
        passphrase_file: Value of --passphrase-file.
        confirm: Ask for a new passphrase twice.

    Raises:
        UsageError: Neither is given, and there is no terminal.
    """
    forbid_memory_dumps()
    if key_file is not None:
        return KeyFile(key_file)
    if passphrase_file is not None:
        return Passphrase(read_passphrase(passphrase_file))
    return Passphrase(ask_passphrase("passphrase of the keyring: ", confirm=confirm))


def read_passphrase(source: str) -> str:
    """Return the first line of a private file, or of standard input for ``-``.

    Raises:
        KeyringMissing, InsecurePermissions: The file does not exist or is not private.
        UsageError: It is not UTF-8.
    """
    try:
        if source == "-":
            text = sys.stdin.readline()
        else:
            text = read_private(Path(source), "passphrase file").decode()
    except UnicodeDecodeError:
        raise UsageError(f"passphrase file {source} is not UTF-8") from None
    return text.split("\n", 1)[0].rstrip("\r")  # not splitlines: it would also cut at U+2028


def read_label(source: str) -> str:
    """Return the first line of a file, or of standard input for ``-``, as a subject label.

    Raises:
        UsageError: The file cannot be read, or is not UTF-8.
    """
    try:
        if source == "-":
            text = sys.stdin.readline()
        else:
            check_regular(source)
            with Path(source).open(encoding="utf-8-sig") as file:
                text = file.readline(_MAX_LABEL_CHARS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"subject file {source} cannot be read ({error})") from None
    return text.split("\n", 1)[0].rstrip("\r")


def ask_passphrase(prompt: str, *, confirm: bool) -> str:
    """Ask on the terminal without an echo.

    Raises:
        UsageError: There is no terminal, or the two entries differ.
    """
    if not sys.stdin.isatty():
        raise UsageError("no terminal to ask for the passphrase on; give --master FILE or a file")
    text = getpass.getpass(prompt)
    if confirm and getpass.getpass("again: ") != text:
        raise UsageError("the two passphrases differ")
    return text


@contextmanager
def handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Handle signals in the block; only the main thread can."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, new) for number, new in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(*_: object) -> NoReturn:
    """Handle SIGTERM like Ctrl-C: undo what is under way, and exit with 130."""
    raise KeyboardInterrupt
