"""What can be wrong with a data set, each mistake with a name, a sentence and a remedy.

The loaders, ``tools/data.py check`` and the start of a training all show these same sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.errors import UserError

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """One thing found wrong.

    Attributes:
        code: Short stable name of the mistake, such as ``wrong-root``.
        text: What, found, expected and remedy, in one sentence.
        level: ``error`` cannot go on, ``warning`` can and may hurt, ``note`` is harmless.
    """

    code: str
    text: str
    level: Level = "warning"


class DatasetError(UserError):
    """A data set that cannot be used as it lies there.

    Attributes:
        problem: The mistake by name.
    """

    def __init__(self, code: str, text: str) -> None:
        """Keep the name of the mistake beside its sentence."""
        self.problem = Problem(code, text, "error")
        super().__init__(text)

    def __reduce__(self) -> tuple[type[DatasetError], tuple[str, str]]:
        """Rebuild from both arguments, so that the error survives pickling."""
        return type(self), (self.problem.code, self.problem.text)


def examples(names: list[str], limit: int = 3) -> str:
    """Show the first few of many names."""
    shown = ", ".join(names[:limit])
    return f"{shown}, ..." if len(names) > limit else shown


def empty_folder(folder: Path, role: str) -> DatasetError:
    """Refuse a folder without a single picture."""
    return DatasetError(
        f"empty-{role}",
        f"{folder} holds no picture (.jpg, .jpeg or .png), though {role} images are expected "
        "there; copy them there, or unpack the archive again",
    )


def no_name_matches(folder: Path, names: list[str], pattern: str) -> DatasetError:
    """Refuse a folder in which no name can be read."""
    return DatasetError(
        "no-name-matches",
        f"none of the {len(names)} pictures in {folder} is named {pattern} (found "
        f"{examples(names)}); rename them, or describe them in a table: DATASETS.NAMES csv:FILE",
    )


def some_names_do_not_match(folder: Path, names: list[str], pattern: str) -> Problem:
    """Report pictures left out because their names cannot be read."""
    return Problem(
        "names-skipped",
        f"{len(names)} pictures in {folder} are left out because they are not named {pattern} "
        f"({examples(names)}); rename or remove them",
    )


def upper_case_suffix(folder: Path, names: list[str]) -> Problem:
    """Report suffixes that other tools would overlook; here they are read."""
    return Problem(
        "upper-case-suffix",
        f"{len(names)} pictures in {folder} have an upper-case suffix ({examples(names)}); they "
        "are read here, but tools that look for *.jpg miss them: rename them to lower case",
        "note",
    )


def ground_truth_as_gallery(folder: Path) -> DatasetError:
    """Refuse Market-1501's hand-drawn boxes in the place of the gallery."""
    return DatasetError(
        "gt-bbox-as-gallery",
        f"{folder} does not hold the gallery but hand-drawn boxes (every name ends in _00, as in "
        "gt_bbox); the gallery is bounding_box_test of the archive, 19,732 detected boxes",
    )


def single_camera(subset: str) -> DatasetError:
    """Refuse cross-camera scoring where there is only one camera."""
    return DatasetError(
        "single-camera",
        f"all {subset} images come from a single camera, so no query has a match in another one; "
        "set TEST.CROSS_CAMERA False for such a set (the result says so)",
    )


def wrong_counts(title: str, subset: str, found: str, expected: str) -> Problem:
    """Report a subset whose size is not the published one."""
    return Problem(
        "wrong-counts",
        f"{title} {subset}: found {found}, expected {expected}; scores are not comparable with "
        "published ones until the archive is unpacked again",
    )


def kind_mismatch(
    config: Path, images: Path | None, kind: str, other: str, example: str | None
) -> DatasetError:
    """Refuse CUHK03's list of one kind of box with the pictures of the other."""
    evidence = f" ({example} is only in one of them)" if example else ""
    return DatasetError(
        "kind-mismatch",
        f"{config} and {images} do not belong together{evidence}: labels and images must both be "
        f"{kind} or both {other}; bring the other config file, or set CUHK03.KIND",
    )
