"""The graph of an exported file (8-bit pixels to images or embeddings), and its ONNX file."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from engine.api import Anonymizer, Pixels
from layers.pixels import PixelSpace
from modeling.reid_network import ReIDNetwork
from utils.errors import UserError, first_line, optional_package

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


def write(graph: Graph, size: tuple[int, int], path: Path, opset: int) -> None:
    """Write a graph for any number of images.

    Uses torch's tracing exporter: it takes a tenth of the time of the newer one, and does not need
    onnxscript. ``engine.exporting.export`` compares its output with PyTorch.

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
