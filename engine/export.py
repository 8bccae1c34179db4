"""Trained networks as ONNX files for 8-bit images, each compared with PyTorch before it is saved.

A file contains the whole way from 8-bit pixels to images or embeddings.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from data.people.appearance import draw_people
from data.people.photograph import build_camera, draw_track, photograph
from engine.api import Anonymizer, Pixels, find_joint_weights
from engine.checkpoint import (
    NATIVE_NAMES,
    CheckpointError,
    LoadedWeights,
    find_weights,
    save_weights,
)
from layers.pixels import PixelSpace
from modeling.reid_network import ReIDNetwork
from utils.environment import environment_report
from utils.errors import UserError, first_line, optional_package
from utils.files import atomic_write, remove_leftovers, write_text
from utils.logger import Progress

FORMAT = "securereid-export"
FORMAT_VERSION = 1

_PACKED = ("config.yml", "results.json", "calibration.json")

# Verbs of ``engine.api``, and the letter of each network in checkpoints.
VERBS = {"anonymize": "G", "recover": "G_R", "embed": "C"}
INPUT = "pixels"


class ImageGraph(nn.Module):
    """The anonymizer or the recovery network on 8-bit images."""

    output = "images"  # name of the output

    def __init__(self, network: nn.Module, space: PixelSpace, size: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.space = network, space
        # shape of the output; N is any number of images
        self.shape: tuple[str | int, ...] = ("N", *size, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return images uint8 (N, H, W, 3) for images of the same type and shape."""
        images = self.network(self.space.normalize(pixels.permute(0, 3, 1, 2)))
        return self.space.to_uint8(images).permute(0, 2, 3, 1)


class EmbeddingGraph(nn.Module):
    """The re-ID network on 8-bit images; returns embeddings of unit length.

    The classifier is not exported: it is not needed, and its size reveals the number of training
    identities.
    """

    output = "embeddings"

    def __init__(self, network: ReIDNetwork, space: PixelSpace) -> None:
        super().__init__()
        self.network, self.space = network, space
        self.shape: tuple[str | int, ...] = ("N", network.feature_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return embeddings float32 (N, D) of unit length for images uint8 (N, H, W, 3)."""
        return F.normalize(self.network.embed(self.space.normalize(pixels.permute(0, 3, 1, 2))))


Graph = ImageGraph | EmbeddingGraph


def graph_of(verb: str, model: Anonymizer) -> Graph:
    """Return the graph of a verb; it contains the model's network, not a copy."""
    network = model.networks[verb]
    if isinstance(network, ReIDNetwork):
        return EmbeddingGraph(network, model.pixels).eval()
    return ImageGraph(network, model.pixels, model.size).eval()


OPSETS = (13, 20)
DEFAULT_OPSET = 17
_ERRORS_ONLY = 3  # onnxruntime's log level


class ExportError(UserError):
    """A file cannot be made, or onnxruntime cannot run it."""

    exit_code = 1


def packages() -> tuple[ModuleType, ModuleType]:
    """Return the packages onnx and onnxruntime.

    Raises:
        UserError: One is not installed; the message contains the command that installs it.
    """
    remedy = "python3 -m pip install onnx onnxruntime"
    onnx = optional_package("onnx", "exporting", remedy)
    return onnx, optional_package("onnxruntime", "exporting", remedy)


def write_graph(graph: Graph, size: tuple[int, int], path: Path, opset: int) -> None:
    """Write a graph for any number of images.

    Uses torch's tracing exporter: it takes a tenth of the time of the newer one, and does not need
    onnxscript. ``check_parity`` compares its output with PyTorch.

    Raises:
        ExportError: The exporter cannot express the graph.
    """
    example = torch.zeros((2, *size, 3), dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from tracing: sizes are constants, as intended
            torch.onnx.export(
                graph,
                (example,),
                str(path),
                input_names=[INPUT],
                output_names=[graph.output],
                dynamic_axes={INPUT: {0: "N"}, graph.output: {0: "N"}},
                opset_version=opset,
                dynamo=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"torch {torch.__version__} cannot write this network with ONNX opset {opset} "
            f"({first_line(error)}); try another --opset"
        ) from error


def label(graph: Graph, path: Path, metadata: Mapping[str, str]) -> None:
    """Write metadata and the output shape into an ONNX file."""
    onnx, onnxruntime = packages()
    content = onnx.load_model_from_string(path.read_bytes())
    (output,) = content.graph.output
    # The exporter names dimensions that it cannot derive after its own nodes.
    for dimension, known in zip(output.type.tensor_type.shape.dim, graph.shape, strict=True):
        if isinstance(known, int):
            dimension.dim_value = known
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    onnx.helper.set_model_props(content, {**metadata, **versions})
    path.write_bytes(content.SerializeToString())


def start_session(runtime: ModuleType, content: bytes) -> Any:
    """Return a session of onnxruntime on the CPU with as many threads as torch.

    It takes the bytes of a file, since the runtime requires file names in UTF-8.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class OnnxFile:
    """An exported file, run by onnxruntime on the CPU.

    Raises:
        ExportError: onnxruntime cannot load it.
    """

    def __init__(self, path: Path) -> None:
        _, self._runtime = packages()
        try:
            self._session = start_session(self._runtime, path.read_bytes())
        except Exception as error:  # the runtime's errors have no common base class
            raise self._failure(error) from error

    def run(self, pixels: Pixels) -> NDArray[Any]:
        """Return the output for images uint8 (N, H, W, 3).

        Raises:
            ExportError: The runtime fails.
        """
        try:
            (out,) = self._session.run(None, {INPUT: pixels})
        except Exception as error:  # see above
            raise self._failure(error) from error
        return np.asarray(out)

    def _failure(self, error: Exception) -> ExportError:
        return ExportError(
            f"onnxruntime {self._runtime.__version__} cannot run the file that torch "
            f"{torch.__version__} wrote ({first_line(error)}); nothing was exported; try another "
            "--opset, or update onnxruntime"
        )


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict: the name and the bytes of each entry, in order.

    A native checkpoint and ``epoch_{best,latest}_net_*.pth`` of the same weights have one hash.
    """
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode("utf-8"))
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe(verb: str, graph: Graph, model: Anonymizer, weights: LoadedWeights) -> dict[str, str]:
    """Return the metadata of a file: how to use it, and its origin. Lists are JSON.

    It contains no host, user or folder name, because exported files are passed on.
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
        "resize": "Pillow bilinear on the upright 8-bit image, outside of this file",
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


# Runtimes add numbers in a different order, so a few values are rounded to the next grey level.
# Measured share: 1e-5 after a training of two epochs; 7e-5 at the published size with random
# weights, which amplify rounding. The smallest mistake that was tried, division by 256 instead of
# 255, changes 5 % of the values and gives cosines of 1 - 9e-5.
MAX_LEVELS = 1
MAX_SHARE = 1e-3
# Measured: coordinates differ by 8e-7, cosine 1 - 9e-12 (trained); 3e-5 and 1 - 4e-9 (random).
MAX_ERROR = 1e-4
MAX_COSINE_LOSS = 1e-7

_SEED = 1
_NUM_PEOPLE = 4
_BATCHES = (1, 3, 8)  # also more images than the graph was traced with


class ParityError(ExportError):
    """The output of an exported file differs from the network by more than rounding."""


@dataclass(frozen=True)
class ImageParity:
    """The difference between the images of a file and of the network."""

    levels: int  # largest difference in grey levels
    share: float  # share of the values that differ

    allowed = f"{MAX_LEVELS} grey level, in {100 * MAX_SHARE:g} % of the values"

    @classmethod
    def of(cls, exported: NDArray[Any], expected: NDArray[Any]) -> ImageParity:
        """Compare uint8 arrays of one shape."""
        differences = np.abs(exported.astype(np.int16) - expected.astype(np.int16))
        return cls(int(differences.max()), float((differences > 0).mean()))

    @property
    def holds(self) -> bool:
        """Whether only rounding differs."""
        return self.levels <= MAX_LEVELS and self.share <= MAX_SHARE

    def __str__(self) -> str:
        """Return the measured numbers."""
        if not self.levels:
            return "no value differs"
        levels = "grey level" if self.levels == 1 else "grey levels"
        return f"at most {self.levels} {levels}, in {100 * self.share:.2g} % of the values"


@dataclass(frozen=True)
class EmbeddingParity:
    """The difference between the embeddings of a file and of the network."""

    error: float  # largest difference of a coordinate
    cosine: float  # smallest cosine of an image's two embeddings

    allowed = f"{MAX_ERROR:g} of a coordinate, cosine at least 1 - {MAX_COSINE_LOSS:g}"

    @classmethod
    def of(cls, exported: NDArray[Any], expected: NDArray[Any]) -> EmbeddingParity:
        """Compare float32 arrays (N, D) of one shape."""
        first, second = exported.astype(np.float64), expected.astype(np.float64)
        with np.errstate(invalid="ignore"):  # NaN and zero vectors do not hold
            lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
            cosines = (first * second).sum(axis=1) / lengths
            return cls(float(np.abs(first - second).max()), float(cosines.min()))

    @property
    def holds(self) -> bool:
        """Whether only rounding differs; False if a value is NaN."""
        return self.error <= MAX_ERROR and self.cosine >= 1 - MAX_COSINE_LOSS

    def __str__(self) -> str:
        """Return the measured numbers."""
        loss = max(0.0, 1 - self.cosine)  # rounding can give more than 1
        return f"at most {self.error:.1e} of a coordinate, cosine at least 1 - {loss:.1e}"


Parity = ImageParity | EmbeddingParity


def sample_images(model: Anonymizer) -> list[Pixels]:
    """Return the images on which files are compared, at the networks' size.

    Synthetic people (raw and anonymized), noise, a black and a white image.
    """
    people = []
    for number, person in enumerate(draw_people(_SEED, _NUM_PEOPLE)):
        rng = np.random.default_rng([_SEED, number])
        track = draw_track(build_camera(_SEED, number)[0], rng)
        people.append(model.resized(photograph(person, _SEED, number, track, rng)))
    shape = people[0].shape
    noise = np.random.default_rng(_SEED).integers(0, 256, (2, *shape), dtype=np.uint8)
    extremes = [np.full(shape, value, np.uint8) for value in (0, 255)]
    return [*people, *model.anonymize(people), *noise, *extremes]


def check_parity(
    verb: str, run: Callable[[Pixels], NDArray[Any]], model: Anonymizer, images: list[Pixels]
) -> Parity:
    """Compare a file with its network on batches of several sizes.

    ``run`` runs the file on uint8 images (N, H, W, 3). The networks are in float32; the images are
    those of ``sample_images``.

    Raises:
        ParityError: They differ by more than rounding.
        UserError: The output of the network itself contains NaN or infinity.
    """
    ends = np.cumsum(_BATCHES)
    batches = [np.stack(images[end - n : end]) for end, n in zip(ends, _BATCHES, strict=True)]
    output = np.concatenate([run(batch) for batch in batches])
    expected = np.asarray(getattr(model, verb)(images))
    if (output.shape, output.dtype) != (expected.shape, expected.dtype):
        raise ParityError(
            f"{verb}: the exported file returns {output.shape} of {output.dtype}; the network "
            f"returns {expected.shape} of {expected.dtype}; nothing was exported"
        )
    if not np.isfinite(expected).all():
        raise UserError(
            f"{verb}: the output of the network itself contains NaN or infinity; check the "
            "losses of its training"
        )
    kind = EmbeddingParity if verb == "embed" else ImageParity
    parity: Parity = kind.of(output, expected)
    if not parity.holds:
        raise ParityError(
            f"{verb}: the output of the exported file differs from the network ({parity}; allowed: "
            f"{parity.allowed}); nothing was exported; try another --opset, or other versions of "
            "torch and onnxruntime"
        )
    return parity


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    path: Path  # the file
    size: int  # size in bytes
    parity: Parity  # difference between its output and the network's


def export(
    checkpoint: Path,
    output: Path,
    verbs: Sequence[str] = tuple(VERBS),
    *,
    opset: int = DEFAULT_OPSET,
    overwrite: bool = False,
) -> list[Exported]:
    """Write a file such as ``anonymize.onnx`` for each verb; if one fails, none is saved.

    The checkpoint is the OUTPUT_DIR of a training in mode GCR, or official files of the published
    size. ``opset`` is the version of the ONNX operators.

    Raises:
        UserError: The checkpoint is missing, damaged, of mode C or contains NaN, a file exists, or
            a package is not installed.
        ExportError: A file cannot be made or run, or its output differs from the network.
        WriteError: A file could not be written.
    """
    packages()  # fail before the checkpoint is read
    paths = {verb: output / f"{verb}.onnx" for verb in verbs}
    if not overwrite:
        _check_free(list(paths.values()))
    weights = find_joint_weights(checkpoint)
    model = Anonymizer.from_weights(weights, torch.device("cpu"), precision="float32")
    _check_finite(model, weights, verbs)
    images = sample_images(model)
    exported = []
    # All files get their names together at the end, so that a folder never contains half a set.
    with ExitStack() as stack, Progress(len(paths), "exporting", unit="file") as bar:
        for verb, path in paths.items():
            remove_leftovers(output, path.stem)
            temporary = stack.enter_context(atomic_write(path))
            graph = graph_of(verb, model)
            write_graph(graph, model.size, temporary, opset)
            label(graph, temporary, describe(verb, graph, model, weights))
            parity = check_parity(verb, OnnxFile(temporary).run, model, images)
            exported.append(Exported(path, temporary.stat().st_size, parity))
            bar.update()
    return exported


def pack(checkpoint: Path, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Copy what a run consists of, without images of its data set, and return the files.

    These are the best weights, or else the latest, as a native file, and ``config.yml``,
    ``results.json`` and ``calibration.json`` if they exist. The checkpoint is the OUTPUT_DIR of a
    training in any mode, or official files.

    Raises:
        UserError: There is no checkpoint, the output folder is its folder, or contains a run.
        WriteError: A file could not be written.
    """
    if output.resolve() == checkpoint.resolve():
        raise UserError(f"{output} is the checkpoint itself; give another output folder")
    texts = [checkpoint / name for name in _PACKED if (checkpoint / name).is_file()]
    try:
        weights = find_joint_weights(checkpoint)
    except CheckpointError:  # mode C
        weights = find_weights(checkpoint, ("C",))
    if not overwrite:
        _check_free([output / name for name in (*NATIVE_NAMES.values(), *_PACKED)])
    for text in texts:
        write_text(output / text.name, text.read_text("utf-8"))
    packed = [save_weights(output, weights), *(output / text.name for text in texts)]
    # Files of an earlier run would be taken for this one's; its best weights would be preferred.
    for name in {*NATIVE_NAMES.values(), *_PACKED} - {path.name for path in packed}:
        (output / name).unlink(missing_ok=True)
    return packed


def _check_free(paths: Sequence[Path]) -> None:
    existing = [str(path) for path in paths if path.exists() or path.is_symlink()]
    if existing:
        raise UserError(
            f"{' and '.join(existing)} {'exists' if len(existing) == 1 else 'exist'}; choose "
            "another folder, or replace with --overwrite"
        )


def _check_finite(model: Anonymizer, weights: LoadedWeights, verbs: Sequence[str]) -> None:
    """Raise if weights contain NaN or infinity; exported outputs could not be compared."""
    for verb in verbs:
        for name, value in model.networks[verb].state_dict().items():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"{weights.source} contains NaN or infinity (network {VERBS[verb]}, {name}); "
                    "check the losses of its training"
                )
