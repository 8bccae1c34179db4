"""How every command that works with a keyring opens it, and says what is wrong."""

from __future__ import annotations

import argparse
import getpass
import sys
from pathlib import Path

from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile, Master, Passphrase
from engine.vault.secret_files import read_private
from modeling.encryption.ised_errors import UsageError
from tools.lib.command_line import shown

ENVIRONMENT = 3  # exit code where a disk or device failed


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
    """Return what an error is about, its class and its text, as a terminal may show it."""
    return shown(f"{path}: " * bool(path) + f"{type(error).__name__}: {error}")


def master_from(
    key_file: Path | None, passphrase_file: str | None, *, confirm: bool = False
) -> Master:
    """Return the master that arguments name.

    Args:
        key_file: Value of --master.
        passphrase_file: Value of --passphrase-file.
        confirm: Ask for a new passphrase twice.

    Raises:
        UsageError: Neither is given and there is no terminal to ask on.
    """
    if key_file is not None:
        return KeyFile(key_file)
    if passphrase_file is not None:
        return Passphrase(read_passphrase(passphrase_file))
    return Passphrase(ask_passphrase("passphrase of the keyring: ", confirm=confirm))


def read_passphrase(source: str) -> str:
    """Return the first line of a private file, or of standard input for ``-``.

    Raises:
        KeyringMissing, InsecurePermissions: The file is not there or not private.
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


def ask_passphrase(prompt: str, *, confirm: bool) -> str:
    """Ask on the terminal without showing what is typed.

    Raises:
        UsageError: There is no terminal, or the two entries differ.
    """
    if not sys.stdin.isatty():
        raise UsageError("no terminal to ask for the passphrase on; give --master FILE or a file")
    text = getpass.getpass(prompt)
    if confirm and getpass.getpass("again: ") != text:
        raise UsageError("the two passphrases differ")
    return text
