"""What an exported file says of itself: how to feed it, and where it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from engine.api import Anonymizer
from engine.checkpoint import LoadedWeights
from engine.exporting.graphs import INPUT, Graph
from utils.environment import environment_report

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
