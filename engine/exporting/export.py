"""Exporting: every file is written, run and compared before the first gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.api import Anonymizer, find_joint_weights
from engine.checkpoint import LoadedWeights
from engine.exporting import onnx_file
from engine.exporting.graphs import VERBS, graph_of
from engine.exporting.metadata import describe
from engine.exporting.onnx_file import DEFAULT_OPSET, SUFFIX, OnnxFile
from engine.exporting.parity import Parity, check_parity, sample_pictures
from utils.errors import UserError
from utils.files import atomic_write, remove_leftovers
from utils.progress import Progress


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
