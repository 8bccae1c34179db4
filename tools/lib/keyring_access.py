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

from engine.vault.audit import recorded
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile, KeyShares, Master, Passphrase, WrapCommand
from engine.vault.secret_files import forbid_memory_dumps, read_private
from modeling.encryption.ised_errors import IsedError, UsageError
from tools.lib.command_line import shown
from utils.files import check_regular

ENVIRONMENT = 3  # exit code after a failure of a disk or device
_MAX_LABEL_CHARS = 4096  # more than any label has


def add_master_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --master, --share, --passphrase-file and --unwrap-command; at most one may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--master", type=Path, metavar="FILE", help="master key file (mode 600)")
    group.add_argument(
        "--share", type=Path, metavar="FILE", action="append",
        help="file of a share of the master key (mode 600); give as many as are needed",
    )  # fmt: skip
    group.add_argument(
        "--passphrase-file", metavar="FILE",
        help="file whose first line is the passphrase (mode 600), - for standard input; "
        "asked for on the terminal if no other master is given",
    )  # fmt: skip
    group.add_argument(
        "--unwrap-command", metavar="LINE",
        help="command line that decrypts the master key of the keyring from standard input to "
        "standard output",
    )  # fmt: skip


@contextmanager
def open_keyring(arguments: argparse.Namespace, master: Master | None = None) -> Iterator[Keyring]:
    """Open the keyring of a command line, and enter the command (``action``) into its audit log.

    The master is by default the one that the arguments describe.
    """
    master = master or master_from(arguments)
    with Keyring.open(arguments.keyring, master) as keyring, recorded(keyring, arguments.action):
        yield keyring


def secrets_of(arguments: argparse.Namespace) -> list[Path]:
    """Return the files that open the keyring of a command line."""
    files = [arguments.master, *(arguments.share or ())]
    if arguments.passphrase_file not in (None, "-"):
        files.append(Path(arguments.passphrase_file))
    return [file for file in files if file is not None]


def error_line(error: Exception, path: str = "") -> str:
    """Return path, class and message of an error, without characters that steer a terminal."""
    return shown(f"{path}: " * bool(path) + f"{type(error).__name__}: {error}")


class FileErrors:
    """Prints the errors of files, counts files, and keeps the errors for the end of a command."""

    def __init__(self) -> None:
        self.good = 0  # files without an error
        self.exit_code = 0  # the highest of the errors
        self._entries: list[dict[str, str]] = []

    @property
    def count(self) -> int:
        """Number of files with an error."""
        return len(self._entries)

    def add(self, file: Path | str, error: IsedError | None) -> None:
        """Count a file; print its error, if it has one."""
        if error is None:
            self.good += 1
            return
        print(f"error: {error_line(error, str(file))}", file=sys.stderr)
        self.exit_code = max(self.exit_code, error.exit_code)
        kind = type(error).__name__
        self._entries.append({"file": str(file), "error": kind, "message": str(error)})

    def as_json(self) -> dict[str, Any]:
        """Return the number of errors and the errors, for ``--json``."""
        return {"failed": self.count, "errors": self._entries}


def master_from(
    arguments: argparse.Namespace, prefix: str = "", *, confirm: bool = False
) -> Master:
    """Return the master that the arguments describe; forbid memory dumps first.

    The prefix is ``new_`` for the options of a new master. With ``confirm``, a passphrase is asked
    for twice.

    Raises:
        UsageError: No master is given, and there is no terminal; or a wrap command is given
            without the unwrap command.
    """
    forbid_memory_dumps()
    given = {name.removeprefix(prefix): value for name, value in vars(arguments).items()
             if name.startswith(prefix)}  # fmt: skip
    if given.get("wrap_command") is not None and given.get("unwrap_command") is None:
        option = prefix.replace("_", "-")
        raise UsageError(
            f"--{option}wrap-command needs --{option}unwrap-command, which opens the keyring later"
        )
    if given.get("master") is not None:
        return KeyFile(given["master"])
    if given.get("share"):
        return KeyShares(tuple(given["share"]))
    if given.get("unwrap_command") is not None:
        return WrapCommand(given["unwrap_command"], given.get("wrap_command"))
    if given.get("passphrase_file") is not None:
        return Passphrase(read_passphrase(given["passphrase_file"]))
    prompt = "new passphrase: " if prefix else "passphrase of the keyring: "
    options = ("master", "passphrase-file")
    instead = " or ".join(f"--{prefix.replace('_', '-')}{option} FILE" for option in options)
    return Passphrase(ask_passphrase(prompt, instead, confirm=confirm))


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
    except OSError as error:
        reason = error.strerror or error  # without its number and the path a second time
        raise UsageError(f"subject file {source} cannot be read ({reason})") from None
    except UnicodeDecodeError:
        raise UsageError(f"subject file {source} is not UTF-8") from None
    return text.split("\n", 1)[0].rstrip("\r")


def ask_passphrase(prompt: str, instead: str, *, confirm: bool) -> str:
    """Ask on the terminal without an echo, twice if ``confirm``.

    Raises:
        UsageError: There is no terminal (``instead`` are the options to give), or the two entries
            differ.
    """
    if not sys.stdin.isatty():
        raise UsageError(f"no terminal to ask for the passphrase on; give {instead}")
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


@contextmanager
def finishing() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and `kill` set in the block, to end after the work under way."""
    stop = threading.Event()
    with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: stop.set())):
        yield stop


def interrupt(*_: object) -> NoReturn:
    """Handle SIGTERM like Ctrl-C: undo what is under way, and exit with 130."""
    raise KeyboardInterrupt
