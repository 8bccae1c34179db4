"""Make and look after a keyring: the keys that protected pictures are sealed under.

Examples:
    python3 tools/keyring.py --keyring keys.db --master master.key init
    python3 tools/keyring.py --keyring keys.db --master master.key list
    python3 tools/keyring.py --keyring keys.db --master master.key destroy market/0002 --yes
    python3 tools/keyring.py --keyring keys.db --passphrase-file - rekey --new-master new.key

The master is a file of 32 random bytes (--master; `init` makes it), or a passphrase, which is
asked for on the terminal if neither --master nor --passphrase-file is given.
Exit codes: 0 done, 1 refused, 2 usage, 3 environment, 4 keyring, 5 authentication failed,
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from engine.vault import keyring_admin
from engine.vault import keyring_admin as key_transfer
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile, Master, Passphrase
from modeling.encryption.ised_errors import UsageError, WrongMaster
from tools.lib.command_line import Parser, exit_code_of, shown
from tools.lib.keyring_access import (
    ENVIRONMENT,
    add_master_arguments,
    ask_passphrase,
    error_line,
    master_from,
    open_keyring,
    read_passphrase,
)

_NEXT_LINE = "- for standard input, after the keyring's own"


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = _parse(argv)

    def work() -> None:
        try:
            arguments.run(arguments)
        except EOFError:  # Ctrl-D at a question
            raise KeyboardInterrupt from None

    return exit_code_of(work, line=error_line, failed=ENVIRONMENT)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; --keyring and the master may stand before or after the command."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.keyring is None:
        parser.error("the following arguments are required: --keyring")
    if arguments.master is not None and arguments.passphrase_file is not None:
        parser.error("argument --passphrase-file: not allowed with argument --master")
    return arguments


def _parser() -> Parser:
    """Return the command line."""
    parser = Parser(description=__doc__)
    # What is not given after the command must not undo what stands before it.
    again = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for place in (parser, again):
        place.add_argument("--keyring", type=Path, help="the keyring file (required)")
        add_master_arguments(place)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> Parser:
        text = (run.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text, description=text, parents=[again])
        sub.set_defaults(run=run)
        return sub

    command("init", _init)
    command("list", _list).add_argument("subject", nargs="?", help="only this subject label")
    command("rotate", _rotate).add_argument("subject", help="subject label, as `list` shows it")
    revoke = command("revoke", _revoke)
    revoke.add_argument("subject", help="subject label")
    revoke.add_argument("--undo", action="store_true", help="allow the keys again")
    destroy = command("destroy", _destroy)
    destroy.add_argument("subject", help="subject label")
    destroy.add_argument("--yes", action="store_true", help="do not ask: there is no way back")
    rekey = command("rekey", _rekey)
    new = rekey.add_mutually_exclusive_group()
    new.add_argument("--new-master", type=Path, help="new master key file, made here")
    new.add_argument("--new-passphrase-file", help=f"file with a new passphrase; {_NEXT_LINE}")
    command("backup", _backup).add_argument("target", type=Path, help="file to make")
    for name, run in (("export", _export), ("import", _import)):
        transfer = command(name, run)
        if name == "export":
            transfer.add_argument("subject", help="subject label")
        transfer.add_argument("file", type=Path, help="file of exported keys")
        transfer.add_argument(
            "--file-passphrase-file", help=f"file with its passphrase; {_NEXT_LINE}"
        )
    return parser


def _init(arguments: argparse.Namespace) -> None:
    """Make a new keyring, and its master key file if that is not there."""
    master = master_from(arguments.master, arguments.passphrase_file, confirm=True)
    Keyring.create(arguments.keyring, master).close()
    print(shown(f"made {arguments.keyring}"))
    if isinstance(master, KeyFile):
        kept = "keep a copy elsewhere, without it nothing opens again"
        print(shown(f"master key: {master.path}; {kept}"))
    else:
        print("without the passphrase nothing opens again")


def _list(arguments: argparse.Namespace) -> None:
    """Show subjects, key ids, generations, states and days; no secrets."""
    with open_keyring(arguments) as keyring:
        infos = keyring_admin.list_keys(keyring, arguments.subject)
    print(f"{'subject':32} {'key':12} {'gen':>3} {'state':9} {'origin':8} created")
    for info in infos:
        origin = "imported" if info.imported else "own"
        subject = "(erased)" if info.subject is None else shown(info.subject)
        print(
            f"{subject:32} {info.key_id[:12]} {info.generation:3d} {info.state:9} {origin:8} "
            f"{info.created}"
        )


def _rotate(arguments: argparse.Namespace) -> None:
    """Give a subject a new key; its former files still open."""
    with open_keyring(arguments) as keyring:
        info = keyring_admin.rotate(keyring, arguments.subject)
    print(shown(f"{arguments.subject}: generation {info.generation} is active"))


def _revoke(arguments: argparse.Namespace) -> None:
    """Forbid the use of a subject's keys, reversibly."""
    with open_keyring(arguments) as keyring:
        act = keyring_admin.restore if arguments.undo else keyring_admin.revoke
        count = act(keyring, arguments.subject)
    done = "allowed again" if arguments.undo else "revoked"
    print(shown(f"{arguments.subject}: {_keys(count)} {done}"))


def _destroy(arguments: argparse.Namespace) -> None:
    """Destroy a subject's keys for good; no file of the subject opens ever again."""
    question = shown(f"destroy the keys of {arguments.subject}? [yes] ")
    if not arguments.yes and (not sys.stdin.isatty() or input(question) != "yes"):
        raise UsageError("nothing was destroyed; answer yes, or pass --yes")
    with open_keyring(arguments) as keyring:
        count = keyring_admin.destroy(keyring, arguments.subject)
    print(
        shown(f"{arguments.subject}: {_keys(count)} destroyed here; delete old backups ")
        + "and exports, which still hold them"
    )


def _keys(count: int, kind: str = "") -> str:
    return f"{count} {kind}key{'' if count == 1 else 's'}"


def _rekey(arguments: argparse.Namespace) -> None:
    """Change master and root; no protected file changes."""
    try:
        keyring = open_keyring(arguments)  # first, so that the old passphrase is read first
    except WrongMaster:
        new_file = arguments.new_master
        if new_file is None or not keyring_admin.is_in_force(arguments.keyring, KeyFile(new_file)):
            raise
        killed = f"{arguments.keyring}: {new_file} is in force already, by a rekey that was killed"
        print(
            f"{shown(killed)}; it is not known whether what was given is the former master: "
            "destroy it if it is, keep it if it is another keyring's"
        )
        return
    with keyring:
        if arguments.new_master is None and arguments.new_passphrase_file is None:
            new: Master = Passphrase(ask_passphrase("new passphrase: ", confirm=True))
        else:
            new = master_from(arguments.new_master, arguments.new_passphrase_file)
        keyring_admin.rekey(keyring, new)
    print(shown(f"{arguments.keyring}: new master in force; destroy the old one"))


def _backup(arguments: argparse.Namespace) -> None:
    """Copy the keyring while it is in use, and open every row of the copy once."""
    master = master_from(arguments.master, arguments.passphrase_file)  # asked for once, used twice
    with Keyring.open(arguments.keyring, master) as keyring:
        count = keyring_admin.backup(keyring, arguments.target, master)
    print(shown(f"made {arguments.target}: {count} rows, each opened"))


def _export(arguments: argparse.Namespace) -> None:
    """Write one subject's keys to a file under a passphrase."""
    with open_keyring(arguments) as keyring:  # first, so that its passphrase is read first
        passphrase = _file_passphrase(arguments, confirm=True)
        count = key_transfer.export_subject(keyring, arguments.subject, arguments.file, passphrase)
    print(shown(f"made {arguments.file}: {_keys(count)} of {arguments.subject}"))


def _import(arguments: argparse.Namespace) -> None:
    """Add a file of exported keys; they open files and never seal new ones."""
    with open_keyring(arguments) as keyring:
        passphrase = _file_passphrase(arguments, confirm=False)
        subject, count = key_transfer.import_subject(keyring, arguments.file, passphrase)
    print(shown(f"{subject}: {_keys(count, 'new ')}"))


def _file_passphrase(arguments: argparse.Namespace, *, confirm: bool) -> Passphrase:
    """Return the passphrase of a file of exported keys."""
    if arguments.file_passphrase_file is not None:
        return Passphrase(read_passphrase(arguments.file_passphrase_file))
    return Passphrase(ask_passphrase(f"passphrase of {arguments.file}: ", confirm=confirm))


if __name__ == "__main__":
    sys.exit(main())
