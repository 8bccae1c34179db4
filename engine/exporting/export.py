"""What an exported file says of itself: how to feed it, and where it came from.

Parity: an exported file has to answer as the networks do, or it is not published.

Exporting: every file is written, run and compared before the first gets its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.people.appearance import draw_people
from data.people.cameras import build_camera
from data.people.photograph import draw_track, photograph
from engine.api import Anonymizer, Pixels, find_joint_weights
from engine.checkpoint import LoadedWeights
from engine.exporting import onnx_file
from engine.exporting.onnx_file import (
    DEFAULT_OPSET,
    INPUT,
    SUFFIX,
    VERBS,
    ExportError,
    Graph,
    OnnxFile,
    graph_of,
)
from utils.environment import environment_report
from utils.errors import UserError
from utils.files import atomic_write, remove_leftovers
from utils.progress import Progress

FORMAT = "securereid-export"
FORMAT_VERSION = 1


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict: of each entry its name, then its bytes, one by one.

    It is that of ``epoch_{best,latest}_net_*.pth``, whatever else a native checkpoint holds.
    """
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode("utf-8"))
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe(verb: str, graph: Graph, model: Anonymizer, weights: LoadedWeights) -> dict[str, str]:
    """Return the metadata of a file; words as they are, numbers and lists as JSON.

    Neither host, user nor folder names are in it: exported files travel.
    """
    height, width = model.size
    kind = "float32, unit length" if graph.output == "embeddings" else "uint8 RGB"
    made_with = environment_report()
    content = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "verb": verb,
        "input": f"{INPUT}: uint8 RGB (N, {height}, {width}, 3)",
        "output": f"{graph.output}: {kind} ({', '.join(map(str, graph.shape))})",
        "height": str(height),
        "width": str(width),
        "channel_order": "RGB",
        "resize": "Pillow bilinear on the upright 8-bit picture, outside of this file",
        "normalization": "(pixels / 255 - mean) / std, inside of this file",
        "mean": json.dumps(model.pixels.mean),
        "std": json.dumps(model.pixels.std),
        "checkpoint": weights.which,
        "epoch": str(weights.epoch),
        "weights_sha256": weights_sha256(model.networks[verb].state_dict()),
        **{name: made_with[name] for name in ("secure-reid", "git", "torch")},
    }
    if graph.output == "embeddings":
        content["metric"] = "cosine"
    return content


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


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: Where.
        size: In bytes.
        parity: How far its answers are from the network's.
    """

    path: Path
    size: int
    parity: Parity


def export(
    checkpoint: Path,
    output: Path,
    verbs: Sequence[str] = tuple(VERBS),
    *,
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> list[Exported]:
    """Write a file for each verb into a folder, all or none.

    Args:
        checkpoint: OUTPUT_DIR of a training in mode GCR, or official files of the published size.
        output: Folder for ``anonymize.onnx`` and the others.
        verbs: Which.
        opset: Version of ONNX's operators.
        overwrite: Replace files that are there.

    Raises:
        UserError: The checkpoint is missing, damaged, of mode C or broken, a file exists, or a
            package is not installed.
        ExportError: A file could not be made or run, or answers otherwise than its network.
        WriteError: A file could not be written.
    """
    onnx_file.packages()  # now, not after the checkpoint was read
    paths = {verb: output / f"{verb}{SUFFIX}" for verb in verbs}
    if not overwrite:
        _refuse_existing(list(paths.values()))
    weights = find_joint_weights(checkpoint)
    model = Anonymizer.from_weights(weights, torch.device("cpu"), precision="float32")
    _refuse_broken(model, weights, verbs)
    pictures = sample_pictures(model)
    done = []
    # They get their names together, at the end: half a set would be taken for a whole one.
    with ExitStack() as stack, Progress(len(paths), "exporting", unit="file") as bar:
        for verb, path in paths.items():
            remove_leftovers(output, path.stem)
            temporary = stack.enter_context(atomic_write(path))
            graph = graph_of(verb, model)
            onnx_file.write(graph, model.size, temporary, opset)
            onnx_file.label(graph, temporary, describe(verb, graph, model, weights))
            parity = check_parity(verb, OnnxFile(temporary).run, model, pictures)
            done.append(Exported(path, temporary.stat().st_size, parity))
            bar.update()
    return done


def _refuse_existing(paths: Sequence[Path]) -> None:
    there = [str(path) for path in paths if path.exists() or path.is_symlink()]
    if there:
        raise UserError(
            f"{' and '.join(there)} {'exists' if len(there) == 1 else 'exist'}; give another "
            "folder, or --overwrite to replace"
        )


def _refuse_broken(model: Anonymizer, weights: LoadedWeights, verbs: Sequence[str]) -> None:
    """Refuse weights that are no numbers: what they answer equals nothing, not even itself."""
    for verb in verbs:
        for name, value in model.networks[verb].state_dict().items():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"{weights.source} holds values that are no numbers (network {VERBS[verb]}, "
                    f"{name}); check how its training ended"
                )
