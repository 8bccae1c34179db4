"""The commands of tools/keyring.py about shares of the master key and about the audit log."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from engine.vault.audit import restart
from engine.vault.audit_reader import AuditLog, Command, commands
from engine.vault.keyring import Keyring
from engine.vault.master import KeyFile, KeyShares
from engine.vault.secret_files import forbid_memory_dumps, write_new_private
from engine.vault.shares import MAX_SHARES, read_key, split, write_shares
from modeling.encryption.ised_errors import KeyringExists, UsageError
from tools.lib.command_line import Parser, add_json, answer, shown, whole_number
from tools.lib.keyring_access import master_from, open_keyring

Run = Callable[[argparse.Namespace], int | None]


def add_custody_commands(command: Callable[..., Parser], group: Any) -> None:
    """Add `shares create`, `shares combine` and `audit` to the subparsers of tools/keyring.py.

    ``command`` adds a command: name, function, group, and the first words of its name in the log.
    """
    shares = group.add_parser(
        "shares", help="Split a master key among people; enough of them open the keyring together."
    ).add_subparsers(required=True, metavar="ACTION")
    create = command("create", _create_shares, shares, "keyring shares")
    create.add_argument(
        "--shares", type=whole_number(2, MAX_SHARES), required=True, help="number of shares"
    )
    create.add_argument(
        "--needed", type=whole_number(2, MAX_SHARES), required=True,
        help="number of shares that open the keyring",
    )  # fmt: skip
    create.add_argument("--output-folder", type=Path, required=True, help="folder for their files")
    combine = command("combine", _combine_shares, shares, "keyring shares")
    combine.add_argument("files", type=Path, nargs="+", help="files of shares")
    combine.add_argument("--output", type=Path, required=True, help="master key file to create")
    combine.set_defaults(needs_keyring=False)
    audit = command("audit", _audit)
    audit.add_argument(
        "--since", type=_time, metavar="TIME", help="only from this UTC date or time on: 2026-11-29"
    )
    audit.add_argument("--command", metavar="NAME", help="only this command: open, destroy, ...")
    audit.add_argument(
        "--key-id", metavar="ID", help="only commands that used, or may have used, this key"
    )
    add_json(audit)
    instead = audit.add_mutually_exclusive_group()
    instead.add_argument("--verify", action="store_true", help="only check the log; list nothing")
    instead.add_argument(
        "--accept", action="store_true",
        help="set aside a log that is lost or does not match, and begin a new one",
    )  # fmt: skip


def _time(text: str) -> datetime:
    """Return a UTC date or time of the command line."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a date or time such as 2026-11-29 or 2026-11-29T08:30"
        ) from None
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def _create_shares(arguments: argparse.Namespace) -> None:
    """Write shares of the master key file; any NEEDED of them open the keyring."""
    master = master_from(arguments)
    if not isinstance(master, (KeyFile, KeyShares)):
        raise UsageError(
            "shares are made of a master key file; run `rekey --new-master NEW.key` first, then "
            "`shares create` with --master NEW.key"
        )
    with open_keyring(arguments, master):
        shares = split(master.unlock(), arguments.needed, arguments.shares)
        write_shares(shares, arguments.output_folder)
    folder, needed = arguments.output_folder, arguments.needed
    print(shown(f"made {folder}: {len(shares)} shares, any {needed} open {arguments.keyring}"))
    print("give each file to another person and delete it here; then destroy the master key file")


def _combine_shares(arguments: argparse.Namespace) -> None:
    """Write the master key file that shares belong to."""
    forbid_memory_dumps()
    try:
        write_new_private(arguments.output, read_key(arguments.files))
    except FileExistsError:
        raise KeyringExists(f"{arguments.output} exists already; give another --output") from None
    print(shown(f"made {arguments.output} of {len(arguments.files)} shares"))


def _audit(arguments: argparse.Namespace) -> int:
    """List the commands that used the keyring, and verify the log.

    Exit code 5 if an entry was changed, removed, added or reordered.
    """
    if arguments.verify or arguments.accept:
        for name in ("since", "command", "key_id"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option} selects commands to list, but --verify and --accept list none; "
                    "leave one of them out"
                )
    with answer(as_json=arguments.json) as show:
        with Keyring.open(arguments.keyring, master_from(arguments)) as keyring:
            log = AuditLog(keyring)
            every = list(commands(log))
            if arguments.accept:
                if not log.problems:
                    raise UsageError(
                        "the audit log has no problems, so it is not set aside; leave out --accept"
                    )
                kept = restart(keyring)
                text = f"a new audit log begins; the old one: {kept or 'missing'}"
                show({"old_log": kept}, shown(text))
                return 0
        content: dict[str, object] = {"entries": log.count, "last_hash": log.last.hex()}
        selected, text = _selected(every, arguments), ""
        if not arguments.verify:
            content["commands"] = [
                {**asdict(command), "time": command.time.isoformat()} for command in selected
            ]
            text = _table(selected)
        elif not log.problems:
            text = f"{log.count} entries verified; the hash of the last one is {log.last.hex()}"
        show(content | {"notes": log.notes, "problems": log.problems}, text)
    if every and not arguments.verify and not selected:
        print(f"note: none of the {len(every)} commands in the log matches", file=sys.stderr)
    for note in log.notes:
        print(shown(f"note: {note}"), file=sys.stderr)
    for problem in log.problems:
        print(shown(f"error: audit log: {problem}"), file=sys.stderr)
    return 5 if log.problems else 0


def _selected(every: Sequence[Command], arguments: argparse.Namespace) -> list[Command]:
    """Return the commands that the options select, in the order in which they began."""
    selected = (
        command
        for command in every
        if (arguments.since is None or command.time >= arguments.since)
        and (arguments.command is None or command.is_named(arguments.command))
        and (arguments.key_id is None or command.concerns(arguments.key_id.lower()))
    )
    return sorted(selected, key=lambda command: command.entry)


def _table(listed: Sequence[Command]) -> str:
    columns = f"{'entry':>5} {'time (UTC)':16} {'user@host':16} {'command':18} {'result':12}"
    lines = [f"{columns} {'files':>6} {'failed':>6} {'subjects':>8} {'keys':>5}"]
    for command in listed:
        user = command.user if command.login is None else f"{command.login} as {command.user}"
        # Without `keyring` or `protect`: no two commands have the same second word.
        lines.append(
            f"{command.entry:5d} {command.time:%Y-%m-%d %H:%M} "
            f"{shown(f'{user}@{command.host}'):16} {command.command.partition(' ')[2]:18} "
            f"{command.result or 'did not end':12} {command.files:6d} {command.failed:6d} "
            f"{command.subjects:8d} {len(command.keys) + command.more_keys:5d}"
        )
    return "\n".join(lines)
