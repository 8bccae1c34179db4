"""What a file computes: a verb of ``engine.api`` from 8-bit pixels on, normalisation included.

ONNX: writing a graph, and running what was written.
"""

from __future__ import annotations

import inspect
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
from utils.errors import UserError, optional_package

# The verbs, and the letter that checkpoints give to the network of each.
VERBS = {"anonymize": "G", "recover": "G_R", "embed": "C"}
INPUT = "pixels"


class ImageGraph(nn.Module):
    """Pictures in, pictures out: the anonymizer or the recovery network.

    Args:
        network: Maps normalised images to normalised images.
        space: Pixel space of both.
        size: Height and width of both in pixels.

    Attributes:
        output: Name of what comes out.
        shape: Its shape; N is any number of pictures.
    """

    output = "images"

    def __init__(self, network: nn.Module, space: PixelSpace, size: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.space = network, space
        self.shape: tuple[str | int, ...] = ("N", *size, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 (N, H, W, 3) to the same."""
        images = self.network(self.space.normalize(pixels.permute(0, 3, 1, 2)))
        return self.space.to_uint8(images).permute(0, 2, 3, 1)


class EmbeddingGraph(nn.Module):
    """Pictures in, unit embeddings out.

    The classifier stays outside: nobody needs it, and it tells how many people there were to train
    on.

    Args:
        network: The re-ID network.
        space: Pixel space of its images.

    Attributes:
        output: Name of what comes out.
        shape: Its shape; N is any number of pictures.
    """

    output = "embeddings"

    def __init__(self, network: ReIDNetwork, space: PixelSpace) -> None:
        super().__init__()
        self.network, self.space = network, space
        self.shape: tuple[str | int, ...] = ("N", network.feature_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map uint8 (N, H, W, 3) to float32 (N, D), each of length 1."""
        return F.normalize(self.network.embed(self.space.normalize(pixels.permute(0, 3, 1, 2))))


Graph = ImageGraph | EmbeddingGraph


def graph_of(verb: str, model: Anonymizer) -> Graph:
    """Return what the file of a verb computes, with the model's own network in it."""
    network = model.networks[verb]
    if isinstance(network, ReIDNetwork):
        return EmbeddingGraph(network, model.pixels).eval()
    return ImageGraph(network, model.pixels, model.size).eval()


SUFFIX = ".onnx"
# Tried from torch 2.4 and onnxruntime 1.17 on.
OPSETS = (13, 20)
DEFAULT_OPSET = 17
_ERRORS_ONLY = 3  # onnxruntime's log level


class ExportError(UserError):
    """A file could not be made, or not be run as it was written."""

    exit_code = 1


def packages() -> tuple[ModuleType, ModuleType]:
    """Return the packages onnx and onnxruntime.

    Raises:
        UserError: One is not installed; the text says which command installs it.
    """
    remedy = "python3 -m pip install onnx onnxruntime"
    onnx = optional_package("onnx", "exporting", remedy)
    return onnx, optional_package("onnxruntime", "exporting", remedy)


def write(graph: Graph, size: tuple[int, int], path: Path, opset: int) -> None:
    """Write a graph for any number of pictures.

    Torch's exporter by tracing is used, which its newer one is to replace: it is the only one that
    works from torch 2.4 on, takes a tenth of the other's time, and needs no onnxscript.
    What it makes is not trusted but compared (``engine.exporting.export``).

    Args:
        graph: On the CPU.
        size: Height and width of its pictures in pixels.
        path: File to write.
        opset: Version of ONNX's operators.

    Raises:
        ExportError: The exporter cannot express the graph.
    """
    example = torch.zeros((2, *size, 3), dtype=torch.uint8)
    parameters = inspect.signature(torch.onnx.export).parameters
    tracing: dict[str, Any] = {"dynamo": False} if "dynamo" in parameters else {}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: sizes are constants here, on purpose
            torch.onnx.export(
                graph,
                (example,),
                str(path),
                input_names=[INPUT],
                output_names=[graph.output],
                dynamic_axes={INPUT: {0: "N"}, graph.output: {0: "N"}},
                opset_version=opset,
                **tracing,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"torch {torch.__version__} cannot write this network with ONNX opset {opset} "
            f"({_first_line(error)}); give another --opset"
        ) from error


def label(graph: Graph, path: Path, metadata: Mapping[str, str]) -> None:
    """Put metadata, and the shape of what comes out, into a file that was written."""
    onnx, onnxruntime = packages()
    content = onnx.load_model_from_string(path.read_bytes())
    (output,) = content.graph.output
    # The exporter names what it cannot derive after its own nodes.
    for dimension, known in zip(output.type.tensor_type.shape.dim, graph.shape, strict=True):
        if isinstance(known, int):
            dimension.dim_value = known
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    onnx.helper.set_model_props(content, {**metadata, **versions})
    path.write_bytes(content.SerializeToString())


class OnnxFile:
    """An exported file as others run it: by onnxruntime, on the CPU.

    Args:
        path: The file.

    Raises:
        ExportError: The runtime does not take it.
    """

    def __init__(self, path: Path) -> None:
        _, self._runtime = packages()
        options = self._runtime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            # Its bytes and not its name, which the runtime wants in UTF-8.
            self._session = self._runtime.InferenceSession(
                path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's errors have no base of their own
            raise self._failure(error) from error

    def run(self, pixels: Pixels) -> NDArray[Any]:
        """Return what the file makes of uint8 (N, H, W, 3).

        Raises:
            ExportError: The runtime fails.
        """
        try:
            (out,) = self._session.run(None, {INPUT: pixels})
        except Exception as error:  # as above
            raise self._failure(error) from error
        return np.asarray(out)

    def _failure(self, error: Exception) -> ExportError:
        return ExportError(
            f"onnxruntime {self._runtime.__version__} does not run the file that torch "
            f"{torch.__version__} wrote ({_first_line(error)}); nothing was exported: give another "
            "--opset, or update onnxruntime"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
