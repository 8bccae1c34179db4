"""Parity: an exported file has to answer as the networks do, or it is not published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.people.appearance import draw_people
from data.people.cameras import build_camera
from data.people.photograph import draw_track, photograph
from engine.api import Anonymizer, Pixels
from engine.exporting.onnx_file import ExportError
from utils.errors import UserError

# Runtimes add in another order, so that a value may fall on the other side of a rounding to 8 bits:
# by one level, and rarely. Measured: 1e-5 of the values after a training of two epochs, 7e-5 at the
# published size with drawn weights, which spread rounding further. Division by 256 in place of 255,
# of the mistakes that were tried the smallest, moves 5 % of them, and cosines to 1 - 9e-5.
MAX_LEVELS = 1
MAX_SHARE = 1e-3
# Measured: 8e-7 of a coordinate and a cosine of 1 - 9e-12 (trained), 3e-5 and 1 - 4e-9 (drawn).
MAX_ERROR = 1e-4
MAX_COSINE_LOSS = 1e-7

_SEED = 1
_PEOPLE = 4
_BATCHES = (1, 3, 8)  # alone, few, and more than the graph was traced with


class ParityError(ExportError):
    """An exported file answers otherwise than the networks it was made from."""


@dataclass(frozen=True)
class ImageParity:
    """How far pictures of a file are from those of the networks.

    Attributes:
        levels: Largest difference in grey levels.
        share: Share of the values that differ at all.
    """

    levels: int
    share: float

    allowed = f"{MAX_LEVELS} grey level, in {100 * MAX_SHARE:g} % of the values"

    @classmethod
    def of(cls, found: NDArray[Any], expected: NDArray[Any]) -> ImageParity:
        """Compare uint8 arrays of one shape."""
        differences = np.abs(found.astype(np.int16) - expected.astype(np.int16))
        return cls(int(differences.max()), float((differences > 0).mean()))

    @property
    def holds(self) -> bool:
        """Whether they are the same but for rounding."""
        return self.levels <= MAX_LEVELS and self.share <= MAX_SHARE

    def __str__(self) -> str:
        """Return the measured numbers."""
        if not self.levels:
            return "not one value differs"
        levels = "grey level" if self.levels == 1 else "grey levels"
        return f"at most {self.levels} {levels}, in {100 * self.share:.2g} % of the values"


@dataclass(frozen=True)
class EmbeddingParity:
    """How far embeddings of a file are from those of the networks.

    Attributes:
        error: Largest difference of a coordinate.
        cosine: Least cosine of a picture's two embeddings.
    """

    error: float
    cosine: float

    allowed = f"{MAX_ERROR:g} of a coordinate, cosine at least 1 - {MAX_COSINE_LOSS:g}"

    @classmethod
    def of(cls, found: NDArray[Any], expected: NDArray[Any]) -> EmbeddingParity:
        """Compare float32 arrays (N, D) of one shape."""
        first, second = found.astype(np.float64), expected.astype(np.float64)
        with np.errstate(invalid="ignore"):  # no numbers, or none but zeros: it does not hold
            lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
            cosines = (first * second).sum(axis=1) / lengths
            return cls(float(np.abs(first - second).max()), float(cosines.min()))

    @property
    def holds(self) -> bool:
        """Whether they are the same but for rounding; no number is not."""
        return self.error <= MAX_ERROR and self.cosine >= 1 - MAX_COSINE_LOSS

    def __str__(self) -> str:
        """Return the measured numbers."""
        loss = max(0.0, 1 - self.cosine)  # rounding may carry it beyond 1
        return f"at most {self.error:.1e} of a coordinate, cosine at least 1 - {loss:.1e}"


Parity = ImageParity | EmbeddingParity


def sample_pictures(model: Anonymizer) -> list[Pixels]:
    """Return pictures at the networks' size on which files are compared with them.

    Drawn people, raw and anonymized; noise; black and white.
    """
    people = [model.resized(picture) for picture in _photographs()]
    rng = np.random.default_rng(_SEED)
    noise = rng.integers(0, 256, (2, *people[0].shape), dtype=np.uint8)
    extremes = [np.full_like(people[0], value) for value in (0, 255)]
    return [*people, *model.anonymize(people), *noise, *extremes]


def check_parity(
    verb: str, run: Callable[[Pixels], NDArray[Any]], model: Anonymizer, pictures: list[Pixels]
) -> Parity:
    """Compare a file with the networks, in batches of several sizes.

    Args:
        verb: Of the file and of ``Anonymizer``.
        run: Runs the file on uint8 (N, H, W, 3).
        model: The networks, computing in float32.
        pictures: As of ``sample_pictures``.

    Raises:
        ParityError: They differ by more than rounding.
        UserError: The network itself answers with what is no number.
    """
    found = np.concatenate([run(batch) for batch in _batches(pictures)])
    expected = np.asarray(getattr(model, verb)(pictures))
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ParityError(
            f"{verb}: the exported file returns {found.shape} of {found.dtype} where the network "
            f"returns {expected.shape} of {expected.dtype}; nothing was exported"
        )
    if not np.isfinite(expected).all():
        raise UserError(
            f"{verb}: the network itself makes no numbers of what files are compared on (people, "
            "noise, black and white); check how its training ended"
        )
    kind = EmbeddingParity if verb == "embed" else ImageParity
    parity: Parity = kind.of(found, expected)
    if not parity.holds:
        raise ParityError(
            f"{verb}: the exported file answers otherwise than the network ({parity}; allowed: "
            f"{parity.allowed}); nothing was exported: give another --opset, or try other versions "
            "of torch and onnxruntime"
        )
    return parity


def _photographs() -> list[Image.Image]:
    photographs = []
    for number, person in enumerate(draw_people(_SEED, _PEOPLE)):
        rng = np.random.default_rng([_SEED, number])
        track = draw_track(build_camera(_SEED, number)[0], rng)
        photographs.append(photograph(person, _SEED, number, track, rng))
    return photographs


def _batches(pictures: list[Pixels]) -> list[Pixels]:
    """Return the pictures as arrays (N, H, W, 3) of several N."""
    ends = np.cumsum(_BATCHES)
    assert ends[-1] == len(pictures)
    return [np.stack(pictures[end - n : end]) for end, n in zip(ends, _BATCHES, strict=True)]
