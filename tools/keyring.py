r"""Create and administer a keyring: the keys that protected images are sealed under.

Examples:
    python3 tools/keyring.py --keyring keys.db --master master.key init
    python3 tools/keyring.py --keyring keys.db --master master.key list
    python3 tools/keyring.py --keyring keys.db --master master.key destroy market/0002 --yes
    python3 tools/keyring.py --keyring keys.db --master master.key destroy market/0002 cuhk/17 \
        --folder sealed --certificate erasure.json
    python3 tools/keyring.py --keyring keys.db --master master.key expire --older-than 30d --dry-run
    python3 tools/keyring.py --keyring keys.db --passphrase-file - rekey --new-master new.key
    python3 tools/keyring.py --keyring keys.db --master master.key shares create --shares 5 \
        --needed 3 --output-folder shares
    python3 tools/keyring.py --keyring keys.db --master master.key audit --since 2026-11-01

The master is a file of 32 random bytes (--master; `init` creates it) or shares of it (--share), a
key that a command decrypts (--unwrap-command), or a passphrase, which is asked for on the terminal
if no master is given (docs/OPERATING.md). A label on the command line is visible to other users and
stays in the shell's history; --subject-file FILE avoids both.
Exit codes: 0 done, 1 refused, 2 usage, 3 environment, 4 keyring, 5 authentication failed,
130 interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: import from the root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import utils.program  # noqa: F401 - acts before other imports

from engine.vault import erasure, keyring_admin
from engine.vault.audit import recorded
from engine.vault.keyring import Keyring
from engine.vault.keyring_rows import IMAGE, ORIGINAL
from engine.vault.master import KeyFile, Passphrase, WrapCommand
from modeling.encryption.ised_errors import UsageError, WrongMaster
from tools.lib.command_line import Parser, add_json, answer, exit_code_of, shown
from tools.lib.custody import Run, add_custody_commands
from tools.lib.keyring_access import (
    ENVIRONMENT,
    add_master_arguments,
    ask_passphrase,
    error_line,
    handling,
    interrupt,
    master_from,
    open_keyring,
    read_label,
    read_passphrase,
)

_COPIES = "delete old backups and exports, which still hold them"
_LAST = {"used": "last used", "created": "created"}
_NEXT_LINE = "- for standard input, after the keyring's own"
_WRAP = "command line that encrypts a new random master key; give %s too, which decrypts it"


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = _parse(argv)

    def work() -> int | None:
        try:
            with handling({signal.SIGTERM: interrupt}):
                source = getattr(arguments, "subject_file", None)
                if isinstance(source, list):
                    arguments.subject = [read_label(name) for name in source]
                elif source is not None:
                    arguments.subject = read_label(source)
                code: int | None = arguments.run(arguments)
        except EOFError:  # Ctrl-D at a question
            raise KeyboardInterrupt from None
        return code

    return exit_code_of(work, line=error_line, failed=ENVIRONMENT)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; --keyring and the master may come before or after the command."""
    words = sys.argv[1:] if argv is None else argv
    parser = _parser(label_from_file=any(w.split("=")[0] == "--subject-file" for w in words))
    arguments = parser.parse_args(words)
    masters = ("master", "share", "passphrase_file", "unwrap_command")
    given = [name.replace("_", "-") for name in masters if getattr(arguments, name) is not None]
    if getattr(arguments, "public_key", None) is None and arguments.needs_keyring:
        if arguments.keyring is None:
            parser.error("the following arguments are required: --keyring")
    elif arguments.keyring is not None or given:
        option = "keyring" if arguments.keyring is not None else given[0]
        parser.error(f"argument --{option}: not used here, as no keyring is opened; leave it out")
    if len(given) > 1:  # one before the command, another after it
        parser.error(f"argument --{given[1]}: not allowed with argument --{given[0]}")
    return arguments


def _parser(*, label_from_file: bool) -> Parser:
    """Return the command line, with a subject label or --subject-file."""
    parser = Parser(description=__doc__)
    # An option that is missing after the command must not reset one that was given before it.
    after_command = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for options in (parser, after_command):
        options.add_argument("--keyring", type=Path, help="the keyring file (required)")
        add_master_arguments(options)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Run, group: Any = commands, prefix: str = "keyring") -> Parser:
        text = inspect.getdoc(run) or ""
        help_line = text.split("\n", 1)[0]
        sub = group.add_parser(name, help=help_line, description=text, parents=[after_command])
        sub.set_defaults(run=run, action=f"{prefix} {name}", needs_keyring=True)
        return sub

    def subject_command(name: str, run: Run, *, several: bool = False) -> Parser:
        sub = command(name, run)
        # Not an optional argument: `export LABEL --option FILE` would take LABEL for the file.
        if not label_from_file:
            nargs = "+" if several else None
            sub.add_argument("subject", nargs=nargs, help="subject label, as `list` shows it")
        sub.add_argument(
            "--subject-file", action="append" if several else "store",
            help="file whose first line is the label, instead of the argument; - for standard "
            "input, before any passphrase" + several * "; may be repeated",
        )  # fmt: skip
        return sub

    command("init", _init).add_argument(
        "--wrap-command", metavar="LINE", help=_WRAP % "--unwrap-command"
    )
    listing = command("list", _list)
    listing.add_argument("subject", nargs="?", help="only this subject label")
    add_json(listing)
    rotate = subject_command("rotate", _rotate)
    rotate.add_argument(
        "--original", action="store_true",
        help="only the key for source files, also after it was destroyed",
    )  # fmt: skip
    revoke = subject_command("revoke", _revoke)
    revoke.add_argument("--undo", action="store_true", help="allow the keys again")
    destroy = subject_command("destroy", _destroy, several=True)
    expire = command("expire", _expire)
    verify = command("verify-certificate", _verify_certificate)
    _add_erasure_options(destroy, expire, verify)
    command("public-key", _print_public_key)
    rekey = command("rekey", _rekey)
    new = rekey.add_mutually_exclusive_group()
    new.add_argument("--new-master", type=Path, help="new master key file to create")
    new.add_argument("--new-passphrase-file", help=f"file with a new passphrase; {_NEXT_LINE}")
    new.add_argument("--new-unwrap-command", metavar="LINE", help="see --unwrap-command")
    rekey.add_argument("--new-wrap-command", metavar="LINE", help=_WRAP % "--new-unwrap-command")
    command("backup", _backup).add_argument("target", type=Path, help="file to create")
    for transfer in (subject_command("export", _export), command("import", _import)):
        transfer.add_argument("file", type=Path, help="file of exported keys")
        transfer.add_argument(
            "--file-passphrase-file", help=f"file with the passphrase of this file; {_NEXT_LINE}"
        )
    add_custody_commands(command, commands)
    return parser


def _add_erasure_options(destroy: Parser, expire: Parser, verify: Parser) -> None:
    destroy.add_argument(
        "--original-only", action="store_true",
        help="only the keys for source files; the anonymized images still open",
    )  # fmt: skip
    destroy.add_argument(
        "--certificate", type=Path, help="file to create: a signed statement of what was destroyed"
    )
    destroy.add_argument(
        "--folder", type=Path, action="append", default=[],
        help="sealed folder whose files the certificate lists; may be repeated",
    )  # fmt: skip
    expire.add_argument(
        "--older-than", type=_days, required=True, metavar="AGE",
        help="days, weeks or years of 365 days: 30d, 8w, 2y",
    )  # fmt: skip
    expire.add_argument(
        "--by", choices=("used", "created"), default="used",
        help="count the age from the last use to seal: no file younger than AGE is lost; or from "
        "the creation of the key: no file older than AGE remains (default: used)",
    )  # fmt: skip
    expire.add_argument("--dry-run", action="store_true", help="only list what would be destroyed")
    add_json(expire)
    for sub in (destroy, expire):
        sub.add_argument("--yes", action="store_true", help="do not ask: there is no way back")
    add_json(verify)
    verify.add_argument("certificate", type=Path, help="file that `destroy --certificate` made")
    verify.add_argument(
        "--public-key", type=_public_key, metavar="KEY",
        help="what `public-key` printed; --keyring and the master are then not needed",
    )  # fmt: skip


def _init(arguments: argparse.Namespace) -> None:
    """Create a keyring, and its master key file if that does not exist."""
    master = master_from(arguments, confirm=True)
    with Keyring.create(arguments.keyring, master) as keyring, recorded(keyring, arguments.action):
        print(shown(f"made {arguments.keyring}"))
    if isinstance(master, KeyFile):
        kept = "keep a copy elsewhere, without it nothing opens again"
        print(shown(f"master key: {master.path}; {kept}"))
    elif isinstance(master, WrapCommand):
        print("without the key that the unwrap command uses, nothing opens again")
    elif isinstance(master, Passphrase):
        print("without the passphrase nothing opens again")


def _list(arguments: argparse.Namespace) -> None:
    """Show subjects, key ids, generations, states, purposes and days; no secrets."""
    with answer(as_json=arguments.json) as show:
        with open_keyring(arguments) as keyring:
            infos = keyring_admin.list_keys(keyring, arguments.subject)
        show([asdict(info) for info in infos], _table(infos))


def _table(infos: Iterable[keyring_admin.KeyInfo]) -> str:
    infos = list(infos)
    subjects = ["(erased)" if x.subject is None else shown(x.subject) for x in infos]
    width = max(map(len, ("subject", *subjects)))
    columns = f"{'subject':{width}} {'key':12} {'gen':>3} {'state':9} {'purpose':8} {'origin':8}"
    lines = [f"{columns} {'created':10} last use"]
    for info, subject in zip(infos, subjects, strict=True):
        origin = "imported" if info.imported else "own"
        lines.append(
            f"{subject:{width}} {info.key_id[:12]} {info.generation:3d} {info.state:9} "
            f"{info.purpose:8} {origin:8} {info.created} {info.used}"
        )
    return "\n".join(lines)


def _rotate(arguments: argparse.Namespace) -> None:
    """Create a new key for a subject; its former files still open."""
    with open_keyring(arguments) as keyring:
        purpose = ORIGINAL if arguments.original else None
        infos = keyring_admin.rotate(keyring, arguments.subject, purpose)
    for info in infos:
        kind = "" if info.purpose == IMAGE else " of the key for source files"
        print(shown(f"{arguments.subject}: generation {info.generation}{kind} is active"))


def _revoke(arguments: argparse.Namespace) -> None:
    """Forbid the use of a subject's keys, reversibly."""
    with open_keyring(arguments) as keyring:
        act = keyring_admin.restore if arguments.undo else keyring_admin.revoke
        count = act(keyring, arguments.subject)
    done = "allowed again" if arguments.undo else "revoked"
    print(shown(f"{arguments.subject}: {_keys(count)} {done}"))


def _destroy(arguments: argparse.Namespace) -> None:
    """Destroy the keys of subjects; none of their files can ever be opened again."""
    if arguments.folder and arguments.certificate is None:
        raise UsageError("--folder lists files in a certificate; give --certificate FILE too")
    subjects, purpose = arguments.subject, ORIGINAL if arguments.original_only else None
    keys = "keys of source files" if arguments.original_only else "keys"
    _confirm(f"destroy the {keys} of {', '.join(subjects)}?", arguments.yes)
    with open_keyring(arguments) as keyring:
        if arguments.certificate is None:
            count = keyring_admin.destroy(keyring, *subjects, purpose=purpose)
        else:
            count, statement = erasure.destroy_with_certificate(
                keyring, subjects, arguments.folder, arguments.certificate, purpose
            )
    done = f"{_keys(count)} destroyed here" if count else f"{keys} were destroyed already"
    print(shown(f"{', '.join(subjects)}: {done}; {_COPIES}"))
    if arguments.certificate is not None:
        print(shown(f"certificate {arguments.certificate}: {_stated(statement)}"))


def _expire(arguments: argparse.Namespace) -> None:
    """Destroy all keys above an age, except revoked ones; lists them first."""
    days, by, count = arguments.older_than, arguments.by, 0
    with answer(as_json=arguments.json) as show:
        with open_keyring(arguments) as keyring:
            rows, revoked = erasure.expired(keyring, days, by)
            infos = keyring_admin.infos_of(keyring, rows)
            if rows:
                print(_table(infos))
            print(f"{_keys(len(rows))} {_LAST[by]} more than {days} day{'s' * (days > 1)} ago")
            if revoked:
                print(f"{_keys(len(revoked), 'revoked ')} of this age: kept, `destroy` erases them")
            is_wanted = rows and not arguments.dry_run
            if is_wanted:
                _confirm_expiry(keyring, len(rows), days, arguments.yes)
                count = erasure.expire(keyring, days, by, {row.key_id for row in rows})
        keys = [asdict(info) for info in infos]
        show(
            {"keys": keys, "revoked": len(revoked), "destroyed": count},
            f"{_keys(count)} destroyed here; {_COPIES}" if is_wanted else "",
        )


def _confirm_expiry(keyring: Keyring, count: int, days: int, yes: bool) -> None:
    """Ask before keys expire, and enter a person's yes into the audit log.

    If the clock may be wrong, this fails unless a person is asked.
    """
    if problem := erasure.clock_problem(keyring, days):
        advice = "check the clock: if it is or was wrong, keys are destroyed too early"
        if yes or not sys.stdin.isatty():
            ask = "run this on a terminal without --yes to confirm it once"
            raise UsageError(f"{problem}; {advice}; {ask}")
        print(f"{problem}; {advice}")
    _confirm(f"destroy {_keys(count)}?", yes)
    if not yes:
        keyring.use.result = erasure.CONFIRMED


def _verify_certificate(arguments: argparse.Namespace) -> None:
    """Check the signature of a certificate; with the keyring also that its keys are destroyed."""
    path = arguments.certificate
    if arguments.public_key is not None:
        statement = erasure.read_certificate(path, arguments.public_key)
    else:
        with open_keyring(arguments) as keyring:
            statement = erasure.verify_certificate(keyring, path)
    lines = [
        shown(f"{path}: valid; keyring {statement['keyring']}, {statement['time']}"),
        _stated(statement),
    ]
    for folder in statement["folders"]:
        files, unknown = folder["files"], folder["unknown_key"]
        lines.append(shown(f"{folder['path']}: {len(files)} files, {len(unknown)} of unknown keys"))
    with answer(as_json=arguments.json) as show:
        lines += [statement["claim"], *statement["not_guaranteed"]]
        show({"valid": True, "statement": statement}, "\n".join(lines))


def _print_public_key(arguments: argparse.Namespace) -> None:
    """Print the key that certificates of this keyring are verified with; it is not secret."""
    with open_keyring(arguments) as keyring:
        print(erasure.public_key(keyring).hex())


def _confirm(question: str, yes: bool) -> None:
    """Ask on the terminal unless `yes` is set."""
    if not yes and (not sys.stdin.isatty() or input(shown(f"{question} [yes] ")) != "yes"):
        raise UsageError("nothing was destroyed; answer yes, or pass --yes")


def _stated(statement: erasure.Statement) -> str:
    """Return in one line what a certificate states."""
    count = sum(len(folder["files"]) for folder in statement["folders"])
    files = "1 file" if count == 1 else f"{count} files"
    return f"{_keys(len(statement['keys']))} destroyed, {files} can no longer be opened"


def _days(text: str) -> int:
    """Return a number of days, weeks or years in days."""
    match = re.fullmatch(r"([1-9]\d{0,4})([dwy])", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected one or more days, weeks or years: 30d, 8w, 2y"
        )
    return int(match[1]) * {"d": 1, "w": 7, "y": 365}[match[2]]


def _public_key(text: str) -> bytes:
    if re.fullmatch("[0-9a-f]{64}", text) is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 64 hexadecimal digits")
    return bytes.fromhex(text)


def _keys(count: int, adjective: str = "") -> str:
    return f"{count} {adjective}key{'' if count == 1 else 's'}"


def _rekey(arguments: argparse.Namespace) -> None:
    """Change the master, and encrypt all keys again; protected files do not change.

    Subjects' keys are encrypted under a root key, which the master encrypts. Both are replaced, so
    that the former master opens only old copies of the keyring.
    """
    try:
        with open_keyring(arguments) as keyring:  # first, so that the old passphrase is read first
            new = master_from(arguments, "new_", confirm=True)
            keyring_admin.rekey(keyring, new)
    except WrongMaster:
        new_file = arguments.new_master
        if new_file is None or not keyring_admin.is_in_force(arguments.keyring, KeyFile(new_file)):
            raise
        with open_keyring(arguments, KeyFile(new_file)):
            pass  # only for the audit log
        killed = f"{arguments.keyring}: {new_file} is in force already, by a rekey that was killed"
        print(
            f"{shown(killed)}; it is not known whether the given master is the former one: "
            "destroy it if it is, keep it if it belongs to another keyring"
        )
        return
    print(shown(f"{arguments.keyring}: new master in force; destroy the old one"))


def _backup(arguments: argparse.Namespace) -> None:
    """Copy the keyring while it is in use, and open every row of the copy."""
    master = master_from(arguments)  # asked for once, used twice
    with open_keyring(arguments, master) as keyring:
        count = keyring_admin.backup(keyring, arguments.target, master)
    print(shown(f"made {arguments.target}: {count} rows, each opened"))


def _export(arguments: argparse.Namespace) -> None:
    """Write one subject's keys to a file under a passphrase."""
    with open_keyring(arguments) as keyring:  # first, so that its passphrase is read first
        passphrase = _file_passphrase(arguments, confirm=True)
        count = keyring_admin.export_subject(keyring, arguments.subject, arguments.file, passphrase)
    print(shown(f"made {arguments.file}: {_keys(count)} of {arguments.subject}"))


def _import(arguments: argparse.Namespace) -> None:
    """Add exported keys; they open files and never seal new ones."""
    with open_keyring(arguments) as keyring:
        passphrase = _file_passphrase(arguments, confirm=False)
        subject, count = keyring_admin.import_subject(keyring, arguments.file, passphrase)
    print(shown(f"{subject}: {_keys(count, 'new ')}"))


def _file_passphrase(arguments: argparse.Namespace, *, confirm: bool) -> Passphrase:
    if arguments.file_passphrase_file is not None:
        return Passphrase(read_passphrase(arguments.file_passphrase_file))
    prompt = f"passphrase of {arguments.file}: "
    return Passphrase(ask_passphrase(prompt, "--file-passphrase-file FILE", confirm=confirm))


if __name__ == "__main__":
    sys.exit(main())
