"""Problems of data sets: each has a stable code and one sentence with the fix.

The loaders, ``tools/data.py check`` and the start of a training report the same sentences, which
therefore name the settings that a user can change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.images import IMAGE_SUFFIXES
from utils.errors import UserError

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """One problem of a data set."""

    code: str  # short stable name, such as ``wrong-root``
    text: str  # what is wrong, what was expected, and what to do
    # ``error``: the data set cannot be used. ``warning``: it can, but results may be worse than
    # expected. ``note``: harmless.
    level: Level = "warning"


class DatasetError(UserError):
    """A data set that cannot be used.

    Attributes:
        problem: Its code and text.
    """

    def __init__(self, code: str, text: str) -> None:
        """Store code and text."""
        self.problem = Problem(code, text, "error")
        super().__init__(text)

    def __reduce__(self) -> tuple[type[DatasetError], tuple[str, str]]:
        """Rebuild from both arguments, so that the error can be pickled."""
        return type(self), (self.problem.code, self.problem.text)


def examples(names: list[str], limit: int = 3) -> str:
    """Return the first names, separated by commas.

    >>> examples(["a", "b", "c"], 2)
    'a, b, ...'
    """
    shown = ", ".join(names[:limit])
    return f"{shown}, ..." if len(names) > limit else shown


def empty_folder(folder: Path, role: str) -> DatasetError:
    """Return the error for a folder without images."""
    suffixes = " ".join(IMAGE_SUFFIXES)
    return DatasetError(
        f"empty-{role}",
        f"{folder} contains no image ({suffixes}); expected the {role} images; copy them there, "
        "or unpack the archive again",
    )


def no_name_matches(folder: Path, names: list[str], pattern: str) -> DatasetError:
    """Return the error for a folder in which no file name matches a pattern."""
    return DatasetError(
        "no-name-matches",
        f"none of the {len(names)} images in {folder} is named {pattern} (for example "
        f"{examples(names)}); rename them, or describe them in a table: DATASETS.NAMES csv:FILE",
    )


def some_names_do_not_match(folder: Path, names: list[str], pattern: str) -> Problem:
    """Return the warning for images that are left out because of their names."""
    return Problem(
        "names-skipped",
        f"{len(names)} images in {folder} are left out because they are not named {pattern} "
        f"({examples(names)}); rename or remove them",
    )


def upper_case_suffix(folder: Path, names: list[str]) -> Problem:
    """Return the note for suffixes such as ``.JPG``."""
    return Problem(
        "upper-case-suffix",
        f"{len(names)} images in {folder} have an upper-case suffix ({examples(names)}); they "
        "are read here, but tools that look for *.jpg miss them: rename them to lower case",
        "note",
    )


def ground_truth_as_gallery(folder: Path) -> DatasetError:
    """Return the error for Market-1501's hand-drawn boxes in the gallery folder."""
    return DatasetError(
        "gt-bbox-as-gallery",
        f"{folder} contains hand-drawn boxes instead of the gallery (every name ends in _00, as "
        "in gt_bbox); the gallery is bounding_box_test of the archive, 19,732 detected boxes",
    )


def single_camera(subset: str) -> DatasetError:
    """Return the error for cross-camera scoring of images from one camera."""
    return DatasetError(
        "single-camera",
        f"all {subset} images are from one camera, so no query has a match in another camera; if "
        "that is right, set TEST.CROSS_CAMERA False (results are marked with it); if not, put the "
        "camera into the file names (such as 0001_c2_0001.jpg), or use DATASETS.NAMES csv:FILE",
    )


def wrong_counts(title: str, subset: str, found: str, expected: str) -> Problem:
    """Return the warning for a subset whose size differs from the published size."""
    return Problem(
        "wrong-counts",
        f"{title} {subset}: found {found}, expected {expected}; scores are not comparable with "
        "published scores; unpack the archive again",
    )


def kind_mismatch(
    config: Path, images: Path | None, kind: str, other: str, example: str | None
) -> DatasetError:
    """Return the error for CUHK03's protocol of one kind of box with images of the other kind."""
    evidence = f" ({example} is only in one of them)" if example else ""
    return DatasetError(
        "kind-mismatch",
        f"{config} and {images} do not belong together{evidence}: protocol and images must both "
        f"be {kind} or both be {other}; copy the matching file, or set CUHK03.KIND",
    )
