"""File names: which files are pictures, and who and which camera a name says.

Only the base name counts: a parent folder such as ``exp01_c9`` must not decide about a camera.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MARKET_PATTERN = "PPPP_cC[sS]_..., such as 0002_c1s1_000451_03.jpg"

# The separator after the digits is what keeps camera 14 from being read as camera 1.
_MARKET = re.compile(r"(?P<pid>-?\d+)_c(?P<camera>\d+)(?:s\d+)?_")
_TOO_LARGE = 2**63  # identities and cameras become int64
_IGNORED_FOLDERS = {"__macosx"}


class PersonAndCamera(NamedTuple):
    """What a file name says; ``camera`` as written, which is from 1 in the public sets."""

    pid: int
    camera: int


def parse_market_name(name: str) -> PersonAndCamera | None:
    """Read identity and camera of a Market-style base name, ``None`` if it is not one.

    >>> parse_market_name("-1_c3s1_000551_04.jpg")
    PersonAndCamera(pid=-1, camera=3)
    >>> parse_market_name("0000_c14_0030.jpg").camera
    14
    """
    match = _MARKET.match(Path(name).name)
    if match is None:
        return None
    found = PersonAndCamera(int(match["pid"]), int(match["camera"]))
    return found if max(abs(found.pid), found.camera) < _TOO_LARGE else None


def is_image_name(name: str) -> bool:
    """Tell pictures from ``Thumbs.db``, ``._*`` and other things that lie about."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def list_images(folder: Path) -> list[Path]:
    """List the pictures directly in a folder, sorted by name whatever the file system's order."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if is_image_name(e.name) and _is_file_or_dead_link(e)]
    return [folder / name for name in sorted(names)]


def _is_file_or_dead_link(entry: os.DirEntry[str]) -> bool:
    """Tell files, and links whose target is gone: opened, they get their name in an error.

    Left out here, the pictures of a split whose source was moved would be missed in silence.
    """
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:  # a link that leads round in a circle
        return True


def list_folders(folder: Path) -> list[Path]:
    """List the sub-folders of a folder, sorted, without hidden ones and ``__MACOSX``."""
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in entries
                if not entry.name.startswith(".")
                and entry.name.lower() not in _IGNORED_FOLDERS
                and entry.is_dir()
            ]
    except OSError:  # unreadable, or gone meanwhile: nothing to find there
        return []
    return [folder / name for name in sorted(names)]


def upper_case_names(paths: list[Path]) -> list[str]:
    """Base names whose suffix is not in lower case."""
    return [path.name for path in paths if path.suffix != path.suffix.lower()]


def whole_number(text: str) -> int | None:
    """Read digits, of any script, that an int64 holds; None for anything else.

    >>> whole_number("0042"), whole_number("4²"), whole_number("9" * 30), whole_number("")
    (42, None, None, None)
    """
    # isdigit would let superscripts through, which int refuses.
    if not text.isdecimal() or len(text) > 19 or int(text) >= _TOO_LARGE:
        return None
    return int(text)


def pid_of_text(text: str) -> int:
    """Turn an identity written in any way into a number that never changes.

    Digits are taken as they are, as far as an int64 holds them; a name becomes a number above 2**32
    from its SHA-256, so adding a person later moves nobody else's number, and with it nobody's key.

    >>> pid_of_text("0042")
    42
    >>> pid_of_text("alice") == pid_of_text("alice") > 2**32
    True
    """
    text = text.strip()
    if re.fullmatch(r"-?[0-9]{1,19}", text) and abs(int(text)) < _TOO_LARGE:
        return int(text)
    # Names of folders may hold bytes that are no UTF-8.
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return 2**32 + int.from_bytes(digest[:7], "big") // 2  # stays below 2**62: an int64 holds it
