"""MSMT17's lists: which pictures belong to a subset, and which of them are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.datasets.naming import is_image_name, list_folders, whole_number
from data.problems import DatasetError

LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
NAME_PATTERN = "PPPP_III_CC_..., such as 0114_019_10_0303noon_0284_2_ex.jpg"


@dataclass(frozen=True)
class Line:
    """One line of a list: a path below train or test, and the identity."""

    path: str
    pid: int
    camera: int


def camera_of(name: str) -> int | None:
    """Camera (from 1) of an original base name: its third field.

    >>> camera_of("0114_019_10_0303noon_0284_2_ex.jpg")
    10
    """
    fields = name.split("_")
    if len(fields) < 4 or any(whole_number(field) is None for field in fields[:3]):
        return None
    return whole_number(fields[2])


def read_list(path: Path) -> list[Line]:
    """Read lines ``0000/0000_000_01_0303morning_0008_0.jpg 0``: the last space divides them.

    Raises:
        DatasetError: The list is missing or empty, or a line is none; the text names it.
    """
    if not path.is_file():
        raise DatasetError(
            "missing-list",
            f"{path} is missing; unpack the archive again, it holds {', '.join(LISTS)}",
        )
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            "bad-list", f"{path} is no UTF-8 text ({error}); copy the original list again"
        ) from error
    lines = []
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip():
            continue
        name, _, last = text.strip().rpartition(" ")
        camera, pid = camera_of(Path(name).name), whole_number(last)
        if camera is None or pid is None or not is_image_name(Path(name).name):
            raise DatasetError(
                "no-name-matches",
                f"{path} line {number} is {text!r}; expected 'PPPP/NAME.jpg PID' with NAME "
                f"{NAME_PATTERN}; copy the original list again",
            )
        lines.append(Line(name.strip(), pid, camera))
    if not lines:
        raise DatasetError("empty-list", f"{path} is empty; copy the original list again")
    return lines


def files_below(folder: Path) -> dict[str, str]:
    """Path as stored, by path in lower case; listing folders beats looking pictures up."""
    return {
        f"{person.name}/{path.name}".lower(): f"{person.name}/{path.name}"
        for person in list_folders(folder)
        for path in person.iterdir()
        if is_image_name(path.name)
    }
