"""Finding a data set below the root folder, and saying what is wrong when it is not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.datasets.naming import list_folders
from data.problems import DatasetError, examples

Test = Callable[[Path], bool]


def has_folders(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has all of these sub-folders."""
    return all((folder / name).is_dir() for name in names)


def named_children(root: Path, names: Sequence[str]) -> list[Path]:
    """Sub-folders with one of these names in any case, in the order of the names."""
    children = list_folders(root)
    return [child for name in names for child in children if child.name.lower() == name.lower()]


def search_below(start: Path, test: Test, depth: int) -> Path | None:
    """First folder that passes, breadth first: ``start``, then up to ``depth`` levels below."""
    level = [start]
    for _ in range(depth + 1):
        for folder in level:
            if test(folder):
                return folder
        level = [child for folder in level for child in list_folders(folder)]
    return None


def find_below(root: Path, names: Sequence[str], test: Test, depth: int = 2) -> Path | None:
    """First folder that passes ``test`` in or below a child of ``root`` with one of the names.

    Args:
        root: Folder that holds the data sets.
        names: Names the data set's folder goes by, preferred first.
        test: Whether a folder is the data set.
        depth: How many folders may be nested between (archives unpacked into archives).
    """
    for child in named_children(root, names):
        found = search_below(child, test, depth)
        if found is not None:
            return found
    return None


@dataclass(frozen=True)
class Origin:
    """What to tell somebody who lacks a data set.

    Attributes:
        title: Name for people.
        names: Names its folder goes by, preferred first.
        needs: What its folder has to hold, in words.
        page: Where its authors hand it out.
    """

    title: str
    names: tuple[str, ...]
    needs: str
    page: str


def not_found(root: Path, origin: Origin, test: Test) -> DatasetError:
    """Explain why ``find_below`` found nothing: no root, wrong level, or not there.

    Args:
        root: Folder that was searched.
        origin: What was looked for.
        test: Whether a folder is (at least a part of) the data set.
    """
    if not root.is_dir():
        return DatasetError(
            "no-root",
            f"DATASETS.ROOT_DIR {root} is not a folder; give the one that holds {origin.names[0]}/",
        )
    return (
        _too_deep(root, origin.title, origin.names, test)
        or _too_high(root, origin.title, origin.names, test)
        or _absent(root, origin)
    )


def _too_deep(root: Path, title: str, names: Sequence[str], test: Test) -> DatasetError | None:
    root = root.resolve()
    lower = {name.lower() for name in names}
    for folder in (root, root.parent):
        if not test(folder):
            continue
        known = next((f for f in (folder, folder.parent) if f.name.lower() in lower), None)
        if known is not None:
            remedy = f"give the folder above: DATASETS.ROOT_DIR {known.parent}"
        elif folder == root.parent:
            continue  # that folders named alike lie beside the root says nothing
        else:
            remedy = (
                f"rename it to {names[0]} and give the folder above (DATASETS.ROOT_DIR "
                f"{folder.parent}), or use it as one's own data: DATASETS.NAMES folder:{folder}"
            )
        return DatasetError(
            "wrong-root", f"DATASETS.ROOT_DIR {root} is one level too deep for {title}; {remedy}"
        )
    return None


def _too_high(root: Path, title: str, names: Sequence[str], test: Test) -> DatasetError | None:
    for child in list_folders(root):
        candidates = [child, *list_folders(child)]
        for folder in candidates:
            if find_below(folder, names, test) is not None:
                return DatasetError(
                    "wrong-root",
                    f"DATASETS.ROOT_DIR {root} is one level too high for {title}; "
                    f"give DATASETS.ROOT_DIR {folder}",
                )
    return None


def _absent(root: Path, origin: Origin) -> DatasetError:
    found = [child.name + "/" for child in list_folders(root)]
    return DatasetError(
        "not-found",
        f"{origin.title} is not in {root}: expected {' or '.join(f'{n}/' for n in origin.names)} "
        f"with {origin.needs}; found {examples(found, 6) if found else 'no folder'}; nothing is "
        f"downloaded here: its authors give it for research, on their terms, at {origin.page}",
    )
