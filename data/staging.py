"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.files import is_running, sync_folder_if_possible


@contextlib.contextmanager
def staged_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill; it takes the name ``target`` only when all has gone well.

    What an interrupted run left is cleared at the next start. A replaced tree is put aside first,
    and put back if its successor cannot take the name.

    Args:
        target: The final name.
        overwrite: Whether to replace a folder of that name.

    Raises:
        UserError: The folder cannot take its name, for instance because it exists by now.
        OSError: Nothing can be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    tag = f"{socket.gethostname()}-{os.getpid()}"
    staging = target.with_name(f".{target.name}.partial-{tag}")
    aside = target.with_name(f".{target.name}.replaced-{tag}")
    staging.mkdir()
    try:
        yield staging
        if overwrite and target.exists():
            target.rename(aside)
        try:
            staging.rename(target)
        except OSError as error:
            if aside.exists():
                aside.rename(target)
            raise UserError(f"{target} cannot be made ({error.strerror}); try again") from error
        sync_folder_if_possible(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if target.exists():  # never delete the only copy
            shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path) -> None:
    """Clear what runs that were killed have left beside ``target``, or put it back."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-(.+)-(\d+)")
    for folder in sorted(target.parent.glob(f".{target.name}.*")):
        match = pattern.fullmatch(folder.name)
        if match is None or match[2] != socket.gethostname() or _is_used(int(match[3])):
            continue
        if match[1] == "replaced" and not target.exists():
            folder.rename(target)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_used(pid: int) -> bool:
    """Tell whether another process is at it; this one starts anew."""
    return pid != os.getpid() and is_running(pid)
